# SPDX-License-Identifier: Apache-2.0
"""Distillation from Python: any modules, any images."""

from __future__ import annotations

import difflib
import inspect
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

import kdkernels
from kdkernels.train import checkpoint, report
from kdkernels.train.claim import claimed, require_free
from kdkernels.train.config import Config, option
from kdkernels.train.data import (
    Dataset,
    LoaderData,
    LoaderSplit,
    from_arrays,
    load_data,
    shape_of,
    steps_in_short,
)
from kdkernels.train.devices import on_first
from kdkernels.train.errors import InputError, TrainError
from kdkernels.train.experiment import conclude, set_up, user_cache
from kdkernels.train.loop import fit
from kdkernels.train.options import make_method, resolved_options
from kdkernels.train.state import whole
from kdkernels.train.taps import Tapped, shown_two

# Options that a DataLoader has settled, or that look images up by number.
FOR_IMAGES_IN_MEMORY = (
    "batch_size", "accumulate", "augment", "augment_seed", "mixup", "teacher_cache", "cache_views",
    "checkpoint_every", "val_fraction", "split_seed", "image_size",
)  # fmt: skip

# Options of a run that trains or loads its teacher: here it is given.
FOR_A_TEACHER_BY_NAME = ("teacher_checkpoint", "teacher_epochs", "teacher_seed")

# As the command line spells them, but not within a path.
OPTION = r"(?<![\w/.-])--([a-z]\w*(?:[-.]\w+)*)"


@contextmanager
def in_python() -> Iterator[None]:
    """Errors name options as Python does, not as the command line does."""
    try:
        yield
    except TrainError as error:
        text = re.sub(OPTION, lambda found: found[1].replace("-", "_"), str(error))
        error.args = (text,)
        raise


@in_python()
def distill(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | None,
    data: Dataset | DataLoader | str | Path | tuple[Any, Any] | Iterable[tuple[Any, int]],
    *,
    val: DataLoader | TorchDataset | None = None,
    test: DataLoader | TorchDataset | None = None,
    method: str = "kd",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train ``student`` in place, leave it with its best epoch's weights, return the results.

    Args:
        student: from images (B, C, H, W), normalised by the mean and deviation of the training
            pixels, to logits (B, K). On the device of the run afterwards.
        teacher: the same, trained; frozen here. None for a method that needs none, several for
            one that takes several.
        data: ``"digits"`` or a path as for ``--data``; images (N, H, W) or (N, H, W, C) as uint8
            with labels (N,), as arrays or tensors; pairs of an image (PIL's, or such an array) and
            a label, a torchvision data set without transforms say; or a ``Dataset``. Validation
            and test images are drawn from it unless it has them. Or a ``DataLoader`` of images
            (B, C, H, W) as the networks take them and labels: its batches are used as they come,
            on one device, without the trainer's augmentation, teacher cache, micro-batches or
            checkpoints within an epoch. Methods that look images up by number (``crd``,
            ``education``) need one of the other forms. A resumed run sees the batches that it would
            have seen if they are drawn by torch: by its global random numbers, or by a
            ``torch.Generator`` of the loader, its sampler or its data set. What Python's or NumPy's
            generators and workers that persist would have drawn is not kept.
        val, test: with a ``DataLoader`` as data, the same of the images that select the best epoch
            and of those that are read once at the end; or data sets, in batches as large.
        method: as for ``--method``.
        options: those of the method, ``{"temperature": 4.0}``. ``at``, ``crd`` and ``fitnet``
            compare features of modules by their paths in ``named_modules()``, ``{"student_taps":
            ["layer2"], "teacher_taps": ["blocks.3"]}``; ``"fc:input"`` is what a module takes.
        seed: of the batches and of what the method draws.
        out: folder of the results, as of ``kdkernels train``, for ``kdkernels report``;
            ``load_student("<out>/seed-0/model.safetensors", network)`` fills a network built as the
            student was. With ``resume=True`` a run goes on there. None keeps nothing.
        **settings: the options of :class:`Config` that are left: ``epochs``, ``lr``, ``ema``, ...;
            not those by which ``kdkernels train`` trains or finds a teacher.

    Raises:
        InputError: options, data or models that do not fit.
    """
    options = dict(options or {})
    if not isinstance(student, nn.Module):
        raise InputError(f"student: expected a network (nn.Module), got {_kind(student)}")
    teachers = _teachers(teacher)
    if unknown := sorted(settings.keys() - SETTINGS):
        near = difflib.get_close_matches(unknown[0], SETTINGS, 3)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise InputError(
            f"distill(): {unknown[0]!r}: not one of its settings{hint}; those of the method go "
            f"into options={{...}}"
        )
    if given := [name for name in FOR_A_TEACHER_BY_NAME if name in settings]:
        raise InputError(
            f"distill(): {given[0]}: the teacher comes trained here; give the network as teacher: "
            f"distill(network, None, data, method='ce', epochs=...) trains one, "
            f"load_student(path).network has that of an earlier run"
        )
    config = Config(method=method, student=type(student).__name__, seed=(seed,), **settings)
    if config.resume and out is None:
        raise InputError("resume: expected out, the folder of the run to go on with")
    made = make_method(method, config.backend, options)
    if isinstance(data, DataLoader) and made.needs_numbers:
        raise InputError(
            f"data: --method {method} looks training images up by their number, which a DataLoader "
            f"does not tell: expected arrays, pairs or a path"
        )
    fabric, config = set_up(config)
    if out is not None and not config.resume:
        on_first(fabric, partial(require_free, Path(out)))
    if isinstance(data, DataLoader):
        data = _loaders(data, val, test, student, config, fabric.world_size)
    elif val is not None or test is not None:
        raise InputError("val, test: expected with a DataLoader as data; others are split here")
    else:
        data = _dataset(data, config)
    config = replace(config, data=data.name)
    report.say(*data.described())
    if isinstance(data, Dataset):
        report.say(*steps_in_short(len(data.train), config.batch_size))
    count = len(made.course.specialities(len(data.classes)))
    if made.needs_teacher and len(teachers) != count:
        raise InputError(
            f"teacher: --method {method} expects {count} trained network{'s' * (count > 1)}, got "
            f"{len(teachers)}"
        )
    torch.manual_seed(seed)
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            return fit(fabric, made, student, teachers, data, config, seed=seed, out=Path(folder))
    out, record = Path(out), config.resolved() | resolved_options(method, options)
    with claimed(fabric, out, record, options, resume=config.resume):
        folder = out / f"seed-{seed}"
        folder.mkdir(exist_ok=True)
        results = fit(fabric, made, student, teachers, data, config, seed=seed, out=folder)
    _keep(fabric, folder / "model.safetensors", student, data)
    on_first(fabric, partial(checkpoint.write_json, folder / "results.json", results))
    conclude(fabric, out, {"config": record, "environment": kdkernels.info()}, [results], config)
    return results


# What distill() takes by name beside its arguments.
SETTINGS = Config.__dataclass_fields__.keys() - {*inspect.signature(distill).parameters}


def _keep(fabric: Fabric, path: Path, student: nn.Module, data: Dataset | LoaderData) -> None:
    """The student's weights; as a module of the user's own it cannot be built from the file."""
    if isinstance(data, LoaderData):
        use = {"loaders": True}
    else:
        use = {"mean": data.mean.tolist(), "std": data.std.tolist()}
    use |= {"own": True, "names": data.classes}
    state = whole(student.state_dict())
    weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    made = type(student).__name__, weights, data.shape, len(data.classes)
    on_first(fabric, partial(checkpoint.save_model, path, *made, **use))


def _teachers(teacher: Any) -> list[nn.Module]:
    """Those given as ``teacher``."""
    if teacher is None:
        return []
    several = isinstance(teacher, Iterable) and not isinstance(teacher, nn.Module | str)
    teachers = list(teacher) if several else [teacher]
    for other in teachers:
        if not isinstance(other, nn.Module):
            raise InputError(
                f"teacher: expected a trained network (nn.Module), or several, got "
                f"{_kind(other)}; load_student(path).network is one of an earlier run"
            )
    return teachers


def _kind(value: Any) -> str:
    return f"{value!r}" if isinstance(value, str | Path) else f"a {type(value).__name__}"


def _loaders(
    train: DataLoader,
    val: DataLoader | TorchDataset | None,
    test: DataLoader | TorchDataset | None,
    student: nn.Module,
    config: Config,
    processes: int,
) -> LoaderData:
    for name in FOR_IMAGES_IN_MEMORY:
        if getattr(config, name) not in (getattr(Config, name), "none"):
            raise InputError(
                f"{option(name)}: not with a DataLoader, whose batches are used as they come"
            )
    if processes > 1:
        raise InputError("--devices: a DataLoader's batches go to one; expected arrays or a path")
    if val is None or test is None:
        raise InputError(
            "val, test: expected a DataLoader or data set each beside that of the training images "
            "(torch.utils.data.random_split makes them)"
        )
    # With a batch sampler of its own, a loader knows no size of batches.
    size = train.batch_size or getattr(train.batch_sampler, "batch_size", Config.batch_size)
    val, test = (
        held if isinstance(held, DataLoader) else DataLoader(held, size) for held in (val, test)
    )
    shape = shape_of(LoaderSplit("validation", val))
    logits = shown_two(Tapped(student, what="student"), shape, what="student").logits
    count = math.prod(logits.shape[1:])
    names = getattr(train.dataset, "classes", ())
    return LoaderData(
        tuple(map(str, names if len(names) == count else range(count))),
        shape,
        LoaderSplit("training", train, count),
        LoaderSplit("validation", val, count),
        LoaderSplit("test", test, count),
    )


def _dataset(data: Any, config: Config) -> Dataset:
    if isinstance(data, Dataset):
        for name in ("val_fraction", "split_seed", "image_size"):
            if getattr(config, name) != getattr(Config, name):
                raise InputError(f"{option(name)}: not with a Dataset, which has its parts already")
        return data
    split = {"val_fraction": config.val_fraction, "split_seed": config.split_seed}
    if isinstance(data, str | Path):
        cache = Path(config.cache_dir) if config.cache_dir else user_cache()
        return load_data(str(data), image_size=config.image_size, cache_dir=cache, **split)
    if config.image_size is not None:
        raise InputError(
            "--image-size: it is for image folders; resize arrays and pairs beforehand"
        )
    if not (isinstance(data, tuple) and len(data) == 2):
        pairs = [(np.asarray(image), label) for image, label in data]
        if len(shapes := {image.shape for image, _ in pairs}) != 1:
            raise InputError(f"data: expected images of one size, got {sorted(shapes) or 'none'}")
        data = np.stack([image for image, _ in pairs]), [label for _, label in pairs]
    return from_arrays(*map(np.asarray, data), **split)
