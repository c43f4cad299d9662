# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from torch.func import functional_call

import kdkernels
from golden import adapter
from kdkernels import functional as kd


def _learned(x) -> dict:
    """The parameters among a case's inputs, by their names in the suite."""
    return {
        name.removeprefix("p."): value for name, value in vars(x).items() if name.startswith("p.")
    }


def _stages(x, prefix: str) -> list:
    return [value for name, value in vars(x).items() if name.rstrip("0123456789") == prefix]


def _loaded(module, parameters: dict, *arguments, **named):
    """A call with these parameters, to which gradients flow, in their order and in fp64."""
    names = [name for name, _ in module.named_parameters()]
    module = module.double()
    return functional_call(module, dict(zip(names, parameters, strict=True)), arguments, named)


@adapter("fitnet_mse", "RepDistiller")
def _(x, h):
    return kd.fitnet_loss(x.feat_student, x.feat_teacher)


@adapter("fitnet", "mdistiller")
def _(x, h):
    module = kdkernels.FitNetLoss(x.feat_student.shape, x.feat_teacher.shape)
    return _loaded(module, _learned(x).values(), x.feat_student, x.feat_teacher)


@adapter("mgd_plain", "mmrazor")
def _(x, h):
    return kd.mgd_loss(x.feat_student, x.feat_teacher, alpha=h.alpha_mgd)


@adapter("mgd", "cls_KD", "MGD")
def _(x, h):
    channels = x.feat_student.shape[1], x.feat_teacher.shape[1]
    module = kdkernels.MGDLoss(*channels, drop=h.lambda_mgd, alpha=h.alpha_mgd)
    return _loaded(module, _learned(x).values(), x.feat_student, x.feat_teacher, x.mask)


@adapter("ofd_feat", "mdistiller")
def _(x, h):
    return kd.ofd_loss(x.feat_student, x.feat_teacher, x.margin)


@adapter("ofd_feat", "overhaul-distillation")
def _(x, h):
    return kd.ofd_loss(x.feat_student, x.feat_teacher, x.margin, reduction="sum")


@adapter("ofd_simple", "mmrazor")
def _(x, h):
    return h.loss_weight / h.mul_factor * kd.ofd_loss(x.feat_student, x.feat_teacher)


@adapter("ofd", "mdistiller")
def _(x, h):
    student, teacher = _stages(x, "fs"), _stages(x, "ft")
    margins = [
        kd.ofd_margin(*bn)
        for bn in zip(_stages(x, "bn_weight"), _stages(x, "bn_bias"), strict=True)
    ]
    module = kdkernels.OFDLoss(
        [s.shape[1] for s in student], margins, stage_weights=h.stage_weights
    )
    loss = _loaded(module, _learned(x).values(), student, teacher)
    shown = {f"out_margin{i}": m.view(1, -1, 1, 1) for i, m in enumerate(margins)}
    return {"loss": loss} | shown


@adapter("ab", "mmrazor")
def _(x, h):
    return h.loss_weight * kd.ab_loss(x.feat_student, x.feat_teacher, margin=h.margin)


@adapter("ab", "torchdistill")
def _(x, h):
    return kd.ab_loss(
        x.feat_student, x.feat_teacher, margin=h.margin, reduction=h.reduction,
        compat="torchdistill",
    )  # fmt: skip


@adapter("ab_multi", "RepDistiller")
def _(x, h):
    return kd.ab_loss(_stages(x, "fs"), _stages(x, "ft"), margin=h.margin)


@adapter("vid", "RepDistiller")
def _(x, h):
    channels = x.feat_student.shape[1], x.feat_teacher.shape[1], h.mid_channels
    module = kdkernels.VIDLoss(*([n] for n in channels), eps=h.eps)
    log_scale, *weights = _learned(x).values()
    return _loaded(module, [*weights, log_scale], x.feat_student, x.feat_teacher)


@adapter("vid_nll", "mdistiller")
def _(x, h):
    return kd.vid_loss(x.pred_mean, x.feat_teacher, x.log_scale, eps=h.eps)


@adapter("vid_nll", "torchdistill")
def _(x, h):
    return kd.vid_loss(x.pred_mean, x.feat_teacher, variance=x.pred_var)


@adapter("maskd", "MasKD")
def _(x, h):
    parameters = _learned(x) or {"mask_token": x.mask_token}
    by_loss = h.eps is None  # the detection code
    options = {"compat": "mmrazor"} if by_loss else {"eps": h.eps}
    tokens = kdkernels.ReceptiveTokens(
        x.feat_teacher.shape[1], h.num_tokens, weighted=by_loss and h.weight_mask
    )
    customised = by_loss and h.custom_mask and h.iter >= h.custom_mask_warmup
    module = kdkernels.MasKDLoss(tokens, customised, **options)
    weight = h.loss_weight if by_loss else 1.0
    return weight * _loaded(module, parameters.values(), x.feat_student, x.feat_teacher)


@adapter("maskd_dice", "MasKD")
def _(x, h):
    masks = kd.receptive_masks(x.feat_teacher, x.mask_token)
    masked = (masks.unsqueeze(2) * x.feat_teacher.unsqueeze(1)).sum(1)
    return {"loss": kd.maskd_dice(masks), "out_masked": masked.detach()}


@adapter("l2", "mmrazor")
def _(x, h):
    loss = kd.l2_loss(
        x.feat_student, x.feat_teacher, normalize=h.normalize, scale=h.mult, root=h.dist,
        by_element=h.div_element,
    )  # fmt: skip
    return h.loss_weight * loss
