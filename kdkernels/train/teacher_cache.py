# SPDX-License-Identifier: Apache-2.0
"""Teachers' outputs on disk: a step that finds them there costs the student alone.

A folder named by a key holds what one teacher makes of the training images under one augmentation:
``view-0``, ``view-1``, ... with a memory-mapped array for each output, and an index with their
digests. The key is a digest of all that decides an output, so what has changed is made anew beside
the old. A view is made under another name and moved to its place when it is whole: what a killed
process leaves is never read.

An output may depend in its last bit on how many images it is computed with (few rows of a matrix
product are summed in another order), but not on which. Views are computed so many images at a time
as training would show the teacher, and a cache in fp32 gives the very bits that it would: on the
machine that made it. On another (instruction set, GPU, number of threads) the teacher itself gives
other last bits, on one CPU up to 2e-7 of the largest logit in float32 and 4e-3 in bfloat16. The key
knows nothing of machines, since making views is costly and the nodes of a cluster differ: a cache
serves them all. What the teacher gives here is compared with the first images of each view instead,
and a run says and records by how much they differ; 0 are the same bits.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kdkernels.train import report
from kdkernels.train.config import Config
from kdkernels.train.data import Batch, Batches
from kdkernels.train.data.batches import near
from kdkernels.train.data.cache import alone, made_whole, new_map
from kdkernels.train.encoding import Form, decode, encode
from kdkernels.train.errors import InputError
from kdkernels.train.methods import Method, Output
from kdkernels.train.teachers import Teacher, Teachers

# Part of every key: raise it when the arrays change.
VERSION = 1
# A stored output further from the teacher's own, as a share of the largest, is another teacher's.
STALE = 0.05


def prepare(
    teachers: Teachers, method: Method, batches: Batches, config: Config, last_step: int
) -> CachedTeachers:
    """The teachers with all that ``method`` will ask them until ``last_step`` on disk."""
    form = form_of(method, config, len(batches.data.classes))
    shown = method.course.shown(batches, last_step)
    parts = {index: part for index, (part, _) in shown.items()}
    cached = CachedTeachers(teachers, batches, Path(config.teacher_cache), form, parts)
    for index, (_, views) in shown.items():
        cached.fill(index, views)
    made, seconds, difference = cached.cost["teacher_cache"].values()
    count = sum(len(views) for _, views in shown.values())
    if made:
        report.say(f"{config.teacher_cache}: made {made} of {count} views in {seconds:.1f} s")
    else:
        report.say(f"{config.teacher_cache}: all {count} views found")
    if difference:
        report.say(
            f"{config.teacher_cache}: some views were made elsewhere; they differ from what the "
            f"teacher gives here by {difference:.1e} of its largest output"
        )
    return cached


def form_of(method: Method, config: Config, classes: int) -> Form:
    """How a run's outputs are kept; refused where its method needs more of them."""
    if not config.cache_topk:
        return Form(config.cache_dtype)
    if method.top_k_temperature is None:
        raise InputError(f"--cache-topk: --method {config.method} needs all of the logits")
    if config.cache_topk > classes:
        raise InputError(
            f"--cache-topk: expected at most {classes}, the number of classes, got "
            f"{config.cache_topk}"
        )
    return Form(config.cache_dtype, config.cache_topk, method.top_k_temperature)


class CachedTeachers:
    """Answers as :class:`Teachers`, from ``folder``; a view that is not there yet is made.

    A teacher that is asked about some of the images only has these ``parts`` of the batches.
    Batches whose images are not views of the training images as they are, but mixed or turned, go
    to the teachers themselves. ``cost`` is what making views has taken, and the largest difference
    of those found to what the teachers give here, as a share of their largest output.
    """

    def __init__(
        self,
        teachers: Teachers,
        batches: Batches,
        folder: Path,
        form: Form,
        parts: Mapping[int, Batches] | None = None,
    ) -> None:
        self.teachers, self.batches, self.form = teachers, batches, form
        self.parts = [(parts or {}).get(index, batches) for index in range(len(teachers))]
        self.folders = [
            folder / key(*teacher_and_part, form)
            for teacher_and_part in zip(teachers, self.parts, strict=True)
        ]
        self.places = [places(part) for part in self.parts]
        self.cost = {"teacher_cache": {"views_made": 0, "seconds": 0.0, "difference": 0.0}}
        self._views: dict[tuple[int, int], dict[str, Tensor]] = {}  # lately used
        self._checked: set[Path] = set()

    def fill(self, index: int, views: Sequence[int]) -> None:
        """Make those of a teacher's views that are missing, and check those that are there."""
        for view in views:
            self._view(index, view)
        self._views.clear()

    def __call__(self, batch: Batch, indices: Sequence[int]) -> list[Output]:
        if batch.rows is None or batch.turns is not None or batch.labels.ndim > 1:
            return self.teachers(batch, indices)
        rows = batch.rows.view(len(batch.views), -1)
        outputs = []
        for index in indices:
            parts = [
                {
                    name: array.index_select(0, some.to(array.device)).to(batch.rows.device)
                    for name, array in self._view(index, view).items()
                }
                for view, some in zip(batch.views, self.places[index][rows], strict=True)
            ]
            arrays = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            outputs.append(decode(arrays, self.teachers[index].network.paths))
        return outputs

    def _view(self, index: int, view: int) -> dict[str, Tensor]:
        """The outputs of a view of all images, near the device, where there is room."""
        if (index, view) not in self._views:
            if len(self._views) >= len(self.teachers) * self.batches.views:
                del self._views[next(iter(self._views))]
            folder = self.folders[index] / f"view-{view}"
            with alone(folder.with_name(f"{folder.name}.lock")):
                if not folder.is_dir():
                    self._make(index, view, folder)
            self._views[index, view] = self._open(index, view, folder)
        return self._views[index, view]

    def _open(self, index: int, view: int, folder: Path) -> dict[str, Tensor]:
        first = folder not in self._checked
        path = folder / "index.json"
        try:
            content = json.loads(path.read_text())
            if content["key"] != folder.parent.name:
                raise ValueError(f"made for {content['key']}")
            arrays = {}
            for name, found in content["digests"].items():
                path = folder / f"{name}.npy"
                # Copy-on-write rather than read-only, which torch.from_numpy would warn about.
                array = np.load(path, mmap_mode="c")
                if first and digest(array) != found:
                    raise ValueError("its content is not what was written")
                arrays[name] = array
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged teacher cache ({error}); delete {folder}") from error
        if first:
            self._compare(index, view, folder, arrays)
            self._checked.add(folder)
        return {name: near(array, self.batches.device) for name, array in arrays.items()}

    def _make(self, index: int, view: int, folder: Path) -> None:
        start_time = time.perf_counter()
        count, size = len(self.parts[index].pool), images_at_once(self.parts[index])
        label = f"teacher cache, view {view}"
        with made_whole(folder) as unfinished, report.progress(label, 0, count) as advance:
            maps: dict[str, np.ndarray] = {}
            for start in range(0, count, size):
                arrays = self._compute(index, view, start)
                end = min(start + size, count)
                for name, array in arrays.items():
                    values = array[: end - start].cpu().numpy()
                    if name not in maps:
                        shape = (count, *values.shape[1:])
                        maps[name] = new_map(unfinished / f"{name}.npy", values.dtype, shape)
                    maps[name][start:end] = values
                advance(end - start)
            digests = {name: digest(array) for name, array in maps.items()}
            content = {"key": folder.parent.name, "digests": digests}
            (unfinished / "index.json").write_text(json.dumps(content, indent=2))
        self.cost["teacher_cache"]["views_made"] += 1
        self.cost["teacher_cache"]["seconds"] += time.perf_counter() - start_time
        self._checked.add(folder)

    def _compute(self, index: int, view: int, start: int) -> dict[str, Tensor]:
        """What is kept of the images shown at once that begin at one of them."""
        part = self.parts[index]
        rows = part.pool[torch.arange(start, start + images_at_once(part)) % len(part.pool)]
        return encode(self.teachers[index](part.view(rows, view)), self.form)

    def _compare(self, index: int, view: int, folder: Path, arrays: dict[str, np.ndarray]) -> None:
        """Refuse what the key could not tell apart: another ``forward`` with the same weights."""
        for name, expected in self._compute(index, view, 0).items():
            if name == "top-classes":  # near values may change places
                continue
            found = torch.from_numpy(arrays[name][: len(expected)])
            found, expected = found.float(), expected[: len(found)].cpu().float()
            largest = expected.nan_to_num(0, 0, 0).abs().max().item() or 1.0
            room = STALE * largest
            if not torch.allclose(found, expected, rtol=0, atol=room, equal_nan=True):
                raise InputError(
                    f"{folder / name}.npy: stale teacher cache: not what the teacher gives; "
                    f"delete {folder.parent}"
                )
            difference = (found - expected).nan_to_num(0).abs().max().item() / largest
            cost = self.cost["teacher_cache"]
            cost["difference"] = max(cost["difference"], difference)


def key(teacher: Teacher, batches: Batches, form: Form) -> str:
    """A name for all that decides what is kept of a teacher's outputs."""
    parts = {
        "version": VERSION,
        "data": batches.data.digest,
        "rows": digest(batches.data.train.rows),
        "normalised": [batches.data.mean.tolist(), batches.data.std.tolist()],
        "teacher": network_digest(teacher.network.network),
        "taps": teacher.network.paths,
        "precision": teacher.precision.precision,
        "augment": str(batches.augment),
        "augment_seed": batches.augment_seed,
        "form": form,
    }
    if batches.classes:
        parts["part"] = digest(batches.pool.numpy())
    if form.dtype == "fp32":
        parts["last_bits"] = images_at_once(batches), batches.device.type, torch.__version__
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def places(batches: Batches) -> Tensor:
    """Where an array of what these batches are of has each training image."""
    found = torch.full((len(batches.data.train),), -1)
    found[batches.pool] = torch.arange(len(batches.pool))
    return found.to(batches.device)


def images_at_once(batches: Batches) -> int:
    """How many images a teacher is shown in training."""
    return batches.batch_size // batches.shares * batches.views


def network_digest(network: nn.Module) -> str:
    """A name for a network's structure, as it prints, and its weights."""
    content = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", repr(network)).encode())
    for name, value in network.state_dict().items():
        content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def digest(array: np.ndarray) -> str:
    """A name for the content of an array."""
    content = hashlib.sha256(f"{array.shape} {array.dtype}".encode())
    content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return content.hexdigest()
