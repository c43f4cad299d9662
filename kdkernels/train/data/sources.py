# SPDX-License-Identifier: Apache-2.0
"""Where a data set's files are: in a folder or in an archive, which is read where it lies."""

from __future__ import annotations

import hashlib
import os
import posixpath
import tarfile
import zipfile
from collections.abc import Collection, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePosixPath

from kdkernels.train.errors import InputError


def open_source(path: Path) -> Source:
    """The source at ``path``, whose existence the caller has seen to."""
    if path.is_dir():
        return Folder(path)
    return Zip(path) if path.suffix in (".npz", ".zip") else Tar(path)


class Source:
    """Files by their names ``a/b/c``, hidden ones left out.

    Where everything lies in one folder of it (as in most tars), names begin below that one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """What to call the data set."""
        return self.path.name.partition(".")[0]

    @property
    def stamp(self) -> str:
        """Changes when the files do, as far as sizes and times of modification tell."""
        status = self.path.stat()
        return f"{self.path.resolve()} {status.st_size} {status.st_mtime_ns}"

    @cached_property
    def names(self) -> list[str]:
        """Names of all files, sorted."""
        return sorted({name.removeprefix(self.root) for name in self._entries[0]})

    @cached_property
    def empty_folders(self) -> list[str]:
        """Names of the folders without a file or a folder in them, sorted."""
        files, folders = self._entries
        inhabited = {posixpath.dirname(name) for name in (*files, *folders)}
        empty = [name for name in folders if name not in inhabited and name.startswith(self.root)]
        return sorted({name.removeprefix(self.root) for name in empty})

    @cached_property
    def root(self) -> str:
        """The innermost folder that holds everything, with a slash behind it; often nothing."""
        folders = {posixpath.dirname(name) for name in self._entries[0]}
        common = posixpath.commonpath(folders) if folders else ""
        return f"{common}/" if common else ""

    def where(self, name: str) -> str:
        """A file as error messages call it."""
        return f"{self.path}: {self.root}{name}"

    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Names and contents of files, in the order in which they are read fastest."""
        raise NotImplementedError

    @cached_property
    def _entries(self) -> tuple[list[str], list[str]]:
        """Files and folders."""
        raise NotImplementedError

    def _unreadable(self, error: object) -> InputError:
        return InputError(f"{self.path}: not a readable archive ({error})")


class Folder(Source):
    """A folder on disk."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def stamp(self) -> str:
        listing = hashlib.sha256(str(self.path.resolve()).encode())
        for name in sorted(chain(*self._entries)):
            status = (self.path / name).stat()
            listing.update(f"\n{name} {status.st_size} {status.st_mtime_ns}".encode())
        return listing.hexdigest()

    def where(self, name: str) -> str:
        return str(self.path / f"{self.root}{name}")

    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            yield name, Path(self.where(name)).read_bytes()

    @cached_property
    def _entries(self) -> tuple[list[str], list[str]]:
        found, folders = [], []
        for folder, children, files in os.walk(self.path, followlinks=True):
            children[:] = [child for child in children if not child.startswith(".")]
            within = Path(folder).relative_to(self.path)
            folders += [(within / child).as_posix() for child in children]
            found += [(within / file).as_posix() for file in files if not file.startswith(".")]
        return found, folders


class Tar(Source):
    """A tar, compressed or not; nothing is unpacked to disk."""

    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        # In the archive's order: going back in a compressed one means starting again.
        wanted = {f"{self.root}{name}" for name in names}
        for name, member, archive in self._members():
            if name in wanted:
                if not member.isfile():
                    raise InputError(f"{self.path}: {name}: a link; expected the file itself")
                yield name.removeprefix(self.root), archive.extractfile(member).read()

    @cached_property
    def _entries(self) -> tuple[list[str], list[str]]:
        files, folders = [], []
        for name, member, _ in self._members():
            (folders if member.isdir() else files).append(name)
        return files, folders

    def _members(self) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
        try:
            with tarfile.open(self.path) as archive:
                for member in archive:
                    if _visible(path := PurePosixPath(member.name)):
                        yield str(path), member, archive
                self._require_end(archive)
        except InputError:
            raise
        except Exception as error:  # every decompressor has errors of its own
            raise self._unreadable(error) from error

    def _require_end(self, archive: tarfile.TarFile) -> None:
        # An uncompressed archive that is cut off where a file begins looks whole to tarfile.
        with self.path.open("rb") as file:
            uncompressed = file.read(262)[257:] == b"ustar"
            file.seek(archive.offset)
            if uncompressed and file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise self._unreadable("its end is missing")


class Zip(Source):
    """A zip, among them NumPy's .npz."""

    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                for name in names:
                    yield name, archive.read(f"{self.root}{name}")
        except Exception as error:  # every decompressor has errors of its own
            raise self._unreadable(error) from error

    @cached_property
    def _entries(self) -> tuple[list[str], list[str]]:
        files, folders = [], []
        try:
            with zipfile.ZipFile(self.path) as archive:
                for entry in archive.infolist():
                    if _visible(PurePosixPath(entry.filename)):
                        kind = folders if entry.is_dir() else files
                        kind.append(entry.filename.removesuffix("/"))
                return files, folders
        except (zipfile.BadZipFile, OSError) as error:
            raise self._unreadable(error) from error


def _visible(path: PurePosixPath) -> bool:
    return not any(part.startswith(".") for part in path.parts)
