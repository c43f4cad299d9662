# SPDX-License-Identifier: Apache-2.0
"""Losses between normalised activation maps: what of a feature map is left without its channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kdkernels import backends, checks, ops, reference
from kdkernels.functional import features
from kdkernels.ops.maps.spatial_attention import DISTANCES


def attention_transfer(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    power: int = 2,
    reduction: str = "mean",
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Attention transfer (arXiv 1612.03928): squared distance of normalised spatial attention.

    With ``A = mean_c F^power`` a sample's attention over its H W positions and
    ``a = A / max(|A|, 1e-12)``: the mean over samples and positions of ``(a_student -
    a_teacher)^2``, as the authors' code has it (so do mdistiller, RepDistiller and mmrazor).
    ``reduction="sum"`` divides by neither.

    student, teacher: maps (B, C, H, W), or one of each per stage (the loss is their sum); channels
        may differ, and the larger map is average-pooled to the other's size.
    power: positive integer; an odd one keeps signs.

    compat:
        ``"paper"`` (also ``"attention-transfer"``, ``"mdistiller"``, ``"repdistiller"``,
        ``"mmrazor"``): as above.
        ``"torchdistill"``: the paper's text: the mean over samples of ``|a_student - a_teacher|``,
        not squared, of channel sums (which normalise to the same).

    A map of zeros has attention 0, and no gradient.
    """
    name = "attention_transfer"
    checks.choice(
        name, "compat", compat,
        ("paper", "attention-transfer", "mdistiller", "repdistiller", "mmrazor", "torchdistill"),
    )  # fmt: skip
    distance = "norm" if compat == "torchdistill" else "squared"
    return _distance(name, student, teacher, power, distance, reduction, backend)


def ft_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    power: int = 2,
    distance_power: int = 1,
    reduction: str = "mean",
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Factor transfer (arXiv 1802.04977): distance of the normalised factors of both networks.

    Of a teacher's paraphraser and a student's translator
    (:class:`kdkernels.Paraphraser`, :class:`kdkernels.Translator`). With
    ``f = normalize(vec(mean_c F^power))``: the mean over samples and positions of
    ``|f_student - f_teacher|^distance_power``, 1 or 2. ``reduction="sum"`` divides by neither.

    student, teacher: factors (B, C, H, W), as those of :func:`attention_transfer`.

    compat:
        ``"paper"`` (also ``"repdistiller"``): as above.
        ``"torchdistill"``: the factor is normalised as it is, over all its C H W elements; shapes
        must agree, and ``power`` is not used. With ``distance_power=1`` the mean over all elements,
        with 2 the mean over samples of ``|f_student - f_teacher|`` (``"sum"``: their sum).
        ``"mmrazor"``: the same with ``distance_power=1``.

    Where the suites divide by a norm without an eps, a factor of zeros is NaN; here it stays 0,
    without a gradient.
    """
    name = "ft_loss"
    checks.choice(name, "compat", compat, ("paper", "repdistiller", "torchdistill", "mmrazor"))
    if distance_power not in (1, 2):
        raise ValueError(f"{name}: distance_power must be 1 or 2, got {distance_power!r}.")
    distance = "absolute" if distance_power == 1 else "squared"
    if compat in ("paper", "repdistiller"):
        return _distance(name, student, teacher, power, distance, reduction, backend)
    if compat == "mmrazor" and distance_power != 1:
        raise ValueError(f"{name}: distance_power must be 1 with compat='mmrazor'.")
    flat = []
    for s, t in features.stages(name, student, teacher):
        features.pair(name, s, t, shape="(B, C, H, W)")
        flat.append((s.flatten(1)[:, None, :, None], t.flatten(1)[:, None, :, None]))
    students, teachers = zip(*flat, strict=True)
    distance = "absolute" if distance_power == 1 else "norm"
    return _distance(name, students, teachers, 1, distance, reduction, backend)


def _distance(name, student, teacher, power, distance, reduction, backend) -> Tensor:
    if not isinstance(power, int) or isinstance(power, bool) or power < 1:
        raise ValueError(f"{name}: power must be a positive integer, got {power!r}.")
    checks.choice(name, "reduction", reduction, features.REDUCTIONS)
    total = 0.0
    for s, t in features.stages(name, student, teacher):
        features.pair(name, s, t, shape="(B, C, H, W)", same=(0,))
        s, t = features.same_size(s, t)
        samples, _, height, width = s.shape
        terms = 1 if reduction == "sum" else max(samples, 1)
        if reduction == "mean" and distance != "norm":
            terms *= height * width
        total = total + sample_distances(name, s, t, power, distance, 1 / terms, backend)
    return total


def sample_distances(name, student, teacher, power, distance, factor, backend) -> Tensor:
    """The sum over samples of the distance of their maps (B, C, H, W), times ``factor``."""
    backend = backends.select("maps.spatial_attention", student.device.type, backend, name)
    kind = DISTANCES.index(distance)
    if backend == "reference":
        return factor * reference.maps.spatial_attention(student, teacher, power, kind)
    return ops.maps.spatial_attention.spatial_attention(
        name, backend, student, teacher, power, kind, factor
    )
