# SPDX-License-Identifier: Apache-2.0
"""The options of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kdkernels.train.data.augment import Augmentation
from kdkernels.train.errors import InputError


@dataclass(frozen=True)
class Config:
    """Train a student on images, alone (ce) or with a teacher.

    Args:
        method: at, ce, crd, dkd, education, fitnet, kd or skd, or several joined by + (skd+dkd);
            their own options follow by their own names, and go to each method that has them;
            --kd.temperature is kd's only, and kd.temperature so in a file.
        data: "digits", or a folder or a tar of one: cifar-10-batches-py or cifar-100-python, images
            (train|val|test/<class>/*, or <class>/*), or arrays (images.npy and labels.npy, also as
            an .npz).
        student: mlp<width>, convnet<width>, resnet<6n+2>, resnet<6n+2>x4, wrn<6n+4>-<width>,
            vgg<8|11|13|16|19>, MobileNetV2, ShuffleV1, ShuffleV2, ResNet<18|34|50|101|152>, or any
            of timm's as timm:<name>.
        teacher: model of the teacher, trained first with cross-entropy; a method that needs no
            teacher is measured against it.
        teacher_checkpoint: a model.safetensors of an earlier run, used instead of training one;
            several joined by commas for a method of several teachers.
        teacher_epochs: epochs of the teacher's training; --epochs if not given.
        teacher_seed: seed of the teacher's training.
        epochs: passes over the training images.
        max_steps: stop after so many steps, if that is earlier.
        batch_size: images per step.
        accumulate: cut every batch into so many micro-batches and add up their gradients: less
            memory, the same step but for rounding, for batch normalisation and for losses that
            relate the samples of a batch, which see a micro-batch each.
        optimizer: sgd (with Nesterov momentum 0.9) or adamw.
        lr: learning rate at the start, or at the height of one cycle.
        schedule: cosine to zero, multistep (a tenth after 5/8, 6/8 and 7/8 of the steps), or
            onecycle (up from a 25th over 3/10 of the steps, then down to nearly zero).
        weight_decay: L2 penalty of all weights; adamw's is decoupled.
        clip_norm: scale gradients down to this norm where theirs is larger; 0 does not.
        ema: decay of a moving average of the student's weights, 0.999 say, which is evaluated and
            exported in their place; 0 has none.
        augment: crop (after padding), flip and cutout, those wanted joined by dashes as in
            crop-flip, or none; auto takes what suits the data set.
        augment_seed: seed of augmentation, the run's own if not given; runs that share it can share
            what a teacher cache holds.
        mixup: mix images and labels by shares drawn from Beta(mixup, mixup); 0 does not.
        seed: one run for each; initial weights and the order of the images come from it.
        teacher_cache: folder in which the teacher's outputs are kept, by data, weights,
            augmentation and its seed; made before training, where missing, for this and later runs.
        cache_views: so many augmented views of each image in all, over and over, which the cache
            has to hold; new ones in every epoch if not given.
        cache_dtype: precision of the cache; fp32 trains to the same bits as the teacher itself, on
            the machine that made it, and elsewhere to what their roundings differ by.
        cache_topk: keep only the k largest logits, for methods that can do with them (kd).
        backend: which implementation runs the distillation losses.
        accelerator: the device to train on.
        devices: so many processes, each with its device and its share of every batch; under
            torchrun those that it started. Batch normalisation sees a share.
        strategy: of several processes: ddp, or fsdp, where each keeps a part of the weights, for
            models that outgrow one device.
        compile: run the student through torch.compile, and on a GPU teachers that are not cached;
            on a CPU theirs are rearranged for oneDNN anyway.
        precision: of the networks; losses are computed in float32 or better. auto is bf16-mixed on
            hardware made for it (GPUs from Ampere on, CPUs with AMX or AVX512-BF16), else 32-true.
        val_fraction: share of the training images that selects the best epoch, where the data
            set has no validation part.
        split_seed: seed by which validation (and, where there is none, test) images are drawn.
        image_size: resize and centre-crop an image folder's images to this many pixels a side.
        checkpoint_every: also checkpoint every so many steps (0: at the end of every epoch only).
        tensorboard: also write TensorBoard event files, in the folder of each seed.
        cache_dir: where decoded image folders are kept; kdkernels in the user's cache if not given.
        out: folder of the results, new or empty; runs/<data>-<method>-<student> if not given.
        resume: go on with the run in --out, whose options need not be given again.
    """

    method: str = "kd"
    data: str = "digits"
    student: str = "mlp16"
    teacher: str | None = None
    teacher_checkpoint: str | None = None
    teacher_epochs: int | None = None
    teacher_seed: int = 0
    epochs: int = 60
    max_steps: int | None = None
    batch_size: int = 64
    accumulate: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.05
    schedule: Literal["cosine", "multistep", "onecycle"] = "cosine"
    weight_decay: float = 5e-4
    clip_norm: float = 0.0
    ema: float = 0.0
    augment: str = "auto"
    augment_seed: int | None = None
    mixup: float = 0.0
    seed: tuple[int, ...] = (0,)
    teacher_cache: str | None = None
    cache_views: int | None = None
    cache_dtype: Literal["fp32", "fp16"] = "fp32"
    cache_topk: int | None = None
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"] = "auto"
    val_fraction: float = 0.1
    split_seed: int = 0
    image_size: int | None = None
    checkpoint_every: int = 0
    tensorboard: bool = False
    cache_dir: str | None = None
    out: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        # The command line has checked types; callers of distill() have not.
        for name, kind in get_type_hints(Config).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise InputError(f"{option(name)}: expected one of {choices}, got {value!r}")
            if value is None and kind == int | None:
                continue
            if kind in (int, int | None) and not isinstance(value, Integral):
                raise InputError(f"{option(name)}: expected a whole number, got {value!r}")
            if kind is float and not isinstance(value, Real):
                raise InputError(f"{option(name)}: expected a number, got {value!r}")
        for name in (
            "epochs", "max_steps", "batch_size", "accumulate", "lr", "teacher_epochs", "image_size",
            "devices", "cache_views", "cache_topk",
        ):  # fmt: skip
            check_range(above=0, **{name: getattr(self, name)})
        for name in (
            "weight_decay", "clip_norm", "ema", "checkpoint_every", "mixup", "augment_seed",
            "teacher_seed", "split_seed",
        ):  # fmt: skip
            check_range(least=0, **{name: getattr(self, name)})
        if not self.ema < 1:
            raise InputError(f"--ema: expected a number below 1, got {self.ema}")
        if not 0 < self.val_fraction < 1:
            raise InputError(
                f"--val-fraction: expected a number between 0 and 1, got {self.val_fraction}"
            )
        if self.ema and self.strategy == "fsdp":
            raise InputError("--ema: the average would be a whole model; not with --strategy fsdp")
        if self.compile and (self.method == "education" or self.strategy == "fsdp"):
            raise InputError("--compile: not with --method education, nor with --strategy fsdp")
        if not self.seed or len(set(self.seed)) < len(self.seed) or min(self.seed) < 0:
            raise InputError(f"--seed: expected different numbers from 0 up, got {list(self.seed)}")
        if self.augment != "auto":
            Augmentation.parse(self.augment)
        if self.teacher_cache:
            if self.mixup:
                raise InputError("--teacher-cache: keeps nothing of mixed images; drop --mixup")
            if self.precision == "64-true":
                raise InputError("--teacher-cache: keeps float32 at most; drop --precision 64-true")
        elif self.cache_dtype != "fp32" or self.cache_topk:
            raise InputError("--cache-dtype, --cache-topk: expected --teacher-cache with them")
        if self.teacher and self.teacher_checkpoint:
            raise InputError("--teacher and --teacher-checkpoint: expected one of them, got both")

    def resolved(self) -> dict[str, Any]:
        """What decides the results, for the record and for comparison when resuming."""
        record = asdict(self)
        where = ("out", "resume", "cache_dir", "teacher_cache", "tensorboard")
        for name in (*where, "devices", "strategy"):
            del record[name]
        return record | {"seed": list(self.seed)}


def option(name: str) -> str:
    """The command line's spelling of an option."""
    return "--" + name.replace("_", "-")


def check_range(
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    **options: float | None,
) -> None:
    """Refuse numbers that are not ``above`` one, or from ``least`` (to ``most``); None is none."""
    for name, value in options.items():
        if above is not None:
            good, wanted = value is None or value > above, f"a number above {above}"
        elif most is not None:
            good = value is None or least <= value <= most
            wanted = f"a number from {least} to {most}"
        else:
            good, wanted = value is None or value >= least, f"{least} or more"
        if not good:
            raise InputError(f"{option(name)}: expected {wanted}, got {value}")
