# SPDX-License-Identifier: Apache-2.0
"""The losses over relations as modules; arguments and errors are those of their functions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdkernels import backends, checks, functional
from kdkernels.modules.base import LossModule, embedded

__all__ = [
    "CCLoss",
    "FSPLoss",
    "GramLoss",
    "ICKDLoss",
    "KDSVDLoss",
    "NSTLoss",
    "PKTLoss",
    "RKDLoss",
    "SPLoss",
    "SSKDLoss",
]


class RelationLoss(LossModule):
    """Base of these modules: features in, loss out."""

    _example = (2, 2)  # a shape of features that the function takes

    def forward(self, student, teacher) -> Tensor:
        """The loss of ``student`` against ``teacher``: what the function takes first."""
        return self._call(student, teacher)

    def _check(self, held):
        # The function itself judges its hyperparameters, on an example.
        checks.choice(type(self).__name__, "backend", held["backend"], backends.BACKENDS)
        x = torch.zeros(self._example, device="cpu")
        alone = {"backend": "reference"} | ({"group": None} if "group" in held else {})
        self._function(*self._given(x), **held | alone)

    def _given(self, x):
        return x, x


class StagesLoss(RelationLoss):
    """Base of those that take maps of several stages."""

    _example = (1, 2, 2, 2)

    def _given(self, x):
        return [x, x], [x, x]


class RKDLoss(RelationLoss, function=functional.rkd_loss):
    """Relational KD: :func:`kdkernels.functional.rkd_loss`."""


class PKTLoss(RelationLoss, function=functional.pkt_loss):
    """Probabilistic knowledge transfer: :func:`kdkernels.functional.pkt_loss`."""


class SPLoss(RelationLoss, function=functional.sp_loss):
    """Similarities of the samples: :func:`kdkernels.functional.sp_loss`."""


class NSTLoss(StagesLoss, function=functional.nst_loss):
    """Neuron selectivity: :func:`kdkernels.functional.nst_loss`."""


class ICKDLoss(StagesLoss, function=functional.ickd_loss):
    """Inter-channel correlations: :func:`kdkernels.functional.ickd_loss`."""


class FSPLoss(StagesLoss, function=functional.fsp_loss):
    """Flow between stages: :func:`kdkernels.functional.fsp_loss`."""


class KDSVDLoss(StagesLoss, function=functional.kdsvd_loss):
    """Singular vectors of stages: :func:`kdkernels.functional.kdsvd_loss`."""


class GramLoss(RelationLoss, function=functional.gram_loss):
    """Gram matrices of modalities: :func:`kdkernels.functional.gram_loss`."""

    _example = (1, 2, 2)


class CCLoss(RelationLoss, function=functional.cc_loss):
    """Correlation congruence of linear embeddings: :func:`kdkernels.functional.cc_loss`.

    Either side's features (B, ...) are flattened and embedded by a linear layer of its own; both
    learn from the loss, so give :meth:`parameters` to the optimiser. Without ``student_dim`` and
    ``teacher_dim`` the features are taken as they are.

    Args:
        student_dim, teacher_dim: widths of the flattened features.
        dim: that of the embeddings; 128 in RepDistiller.
        kernel, gamma, order, reduction, group, backend, compat: as in the function.
    """

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        dim: int = 128,
        **held,
    ) -> None:
        super().__init__(**held)
        name = type(self).__name__
        if (student_dim is None) != (teacher_dim is None):
            raise ValueError(f"{name}: student_dim and teacher_dim must both be given, or neither.")
        self.student_embed = self.teacher_embed = None
        if student_dim is not None:
            for argument, value in (
                ("student_dim", student_dim), ("teacher_dim", teacher_dim), ("dim", dim)
            ):  # fmt: skip
                if checks.integer(name, argument, value) < 1:
                    raise ValueError(f"{name}: {argument} must be at least 1, got {value}.")
            self.student_embed = nn.Linear(student_dim, dim)
            self.teacher_embed = nn.Linear(teacher_dim, dim)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of ``student`` (B, ...) against ``teacher`` (B, ...)."""
        if self.student_embed is None:
            return self._call(student.flatten(1), teacher.flatten(1))
        name = type(self).__name__
        return self._call(
            embedded(name, "student", student, self.student_embed),
            embedded(name, "teacher", teacher, self.teacher_embed),
        )


class SSKDLoss(nn.Module):
    """SSKD (arXiv 2006.07114): cross-entropy, KD, transfer of transformed views, similarities.

    Rows are samples in turn, each with its ``views``: the plain one, then transformed ones, which
    in the paper are its rotations. The sum of ``ce_weight`` times the cross-entropy of the plain
    views, ``kd_weight`` and ``tf_weight`` times ``T^2 KL`` of the plain and of the transformed
    views at ``temperature``, the latter over those in which the teacher is
    :func:`kdkernels.functional.least_wrong` by ``tf_ratio``, and ``ss_weight`` times
    :func:`kdkernels.functional.sskd_similarity` with ``ss_temperature`` and ``ss_ratio``. Defaults
    are the authors'. ``group`` and ``backend`` as in the functions.
    """

    def __init__(
        self,
        *,
        views: int = 4,
        temperature: float = 4.0,
        ss_temperature: float = 0.5,
        tf_ratio: float = 1.0,
        ss_ratio: float = 0.75,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        tf_weight: float = 2.7,
        ss_weight: float = 10.0,
        group=None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.views = checks.integer(name, "views", views)
        self.temperature, self.ss_temperature = temperature, ss_temperature
        self.tf_ratio, self.ss_ratio = tf_ratio, ss_ratio
        for argument, value in (
            ("ce_weight", ce_weight), ("kd_weight", kd_weight), ("tf_weight", tf_weight),
            ("ss_weight", ss_weight),
        ):  # fmt: skip
            setattr(self, argument, checks.number(name, argument, value))
        self.group, self.backend = group, checks.choice(name, "backend", backend, backends.BACKENDS)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_embedding: Tensor,
        teacher_embedding: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """The loss of logits (B, C), embeddings (B, D) and (B, D'), and labels (B / views,)."""
        of_plain = functional.kd_loss(
            student[:: self.views], teacher[:: self.views], labels, temperature=self.temperature,
            ce_weight=self.ce_weight, kd_weight=self.kd_weight, backend=self.backend,
        )  # fmt: skip
        transformed = (
            x.unflatten(0, (-1, self.views))[:, 1:].flatten(0, 1) for x in (student, teacher)
        )
        s, t = transformed
        own = labels.repeat_interleave(self.views - 1)
        transfer = functional.kl_div(
            s, t, temperature=self.temperature, backend=self.backend,
            mask=functional.least_wrong(t, own, self.tf_ratio),
        )  # fmt: skip
        similarity = functional.sskd_similarity(
            student_embedding, teacher_embedding, views=self.views,
            temperature=self.ss_temperature, ratio=self.ss_ratio, group=self.group,
            backend=self.backend,
        )  # fmt: skip
        return of_plain + self.tf_weight * transfer + self.ss_weight * similarity

    def extra_repr(self) -> str:
        return f"views={self.views}, temperature={self.temperature}"
