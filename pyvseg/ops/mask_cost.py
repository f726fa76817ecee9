# SPDX-License-Identifier: Apache-2.0
"""Dice and cross-entropy costs of N mask logits against M targets, as Mask2Former's matcher and its descendants take them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg.ops import _dispatch
from pyvseg.ops.point_sample import point_sample

__all__ = ["MaskCosts", "mask_costs"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bool)
_SLOWER = "10 to 20 times"


class MaskCosts(NamedTuple):
    """Both (N, M), float32 (float64 for float64 logits)."""

    dice: Tensor
    bce: Tensor


def mask_costs(
    logits: Tensor,  # (N, *S), before the sigmoid
    targets: Tensor,  # (M, *S) bool, or floating point in [0, 1]
    points: Tensor | None = None,  # (K, 2) x, y in [0, 1]
    *,
    backend: str = "auto",
) -> MaskCosts:
    """Matching costs over all elements of S: frames, tubes, points sampled before.

    dice = 1 - (2 sum(p t) + 1) / (sum p + sum t + 1) with p = sigmoid(logits); bce is the binary cross entropy with logits,
    averaged over S. A matcher weighs them (Mask2Former, VITA, GenVIS, Tube-Link: 5 and 5) and adds its class cost.

    With `points`, logits (N, *T, h, w) and targets (M, *T, H, W) of any two resolutions are first sampled at the same K
    points in every frame T, bilinearly as `point_sample`; the sums then run over all T and K. Predictions that share targets
    (of several decoder layers) are best stacked along N.

    float32, bfloat16 or float16, summed in float32 or better; differentiable in logits and in floating-point targets,
    deterministic. Without elements (S or K of size 0) bce is 0 and dice 0.

    Raises ValueError for shapes and devices, TypeError for dtypes, naming the argument.
    """
    choice = _plan(logits, targets, points, backend)
    if points is not None:
        logits, targets = (point_sample(masks, points, backend=backend) for masks in (logits, targets))
    if logits.ndim > 2:
        logits, targets = (masks.reshape(masks.shape[0], masks.shape[1:].numel()) for masks in (logits, targets))
    if choice == "reference":
        return reference(logits, targets)
    overlap, entropy, prob, area = _dispatch.call(choice, "mask_cost", logits, targets)
    return MaskCosts(1 - (2 * overlap + 1) / (prob[:, None] + area + 1), entropy / max(logits.shape[1], 1))


def reference(logits: Tensor, targets: Tensor) -> MaskCosts:
    """The published formulas; (N, P), (M, P)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.dtype)
    prob = logits.sigmoid()
    dice = 1 - (2 * prob @ targets.mT + 1) / (prob.sum(1)[:, None] + targets.sum(1) + 1)
    on = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="none")
    off = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="none")
    bce = on @ targets.mT + off @ (1 - targets).mT
    return MaskCosts(dice, bce / max(logits.shape[1], 1))


@_dispatch.planned
def _plan(logits: Tensor, targets: Tensor, points: Tensor | None, backend: str) -> str:
    for name, masks in (("logits", logits), ("targets", targets)):
        if not isinstance(masks, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(masks).__name__}")
        if not masks.is_floating_point() and (masks.dtype != torch.bool or masks is logits):
            raise TypeError(f"{name} must be floating point{' or bool' * (masks is targets)}, got {masks.dtype}")
    if logits.ndim < 2:
        raise ValueError(f"logits must be (N, *S), got shape {tuple(logits.shape)}")
    if targets.device != logits.device:
        raise ValueError(f"targets is on {targets.device} but logits on {logits.device}")
    shared = slice(1, None) if points is None else slice(1, -2)  # sampling takes masks of two resolutions
    if targets.ndim != logits.ndim or targets.shape[shared] != logits.shape[shared]:
        wanted = ", ".join(["M", *map(str, logits.shape[shared])] + ["H", "W"] * (points is not None))
        raise ValueError(f"targets must be ({wanted}) to go with logits, got shape {tuple(targets.shape)}")
    return _dispatch.choose("mask_cost", backend, logits, targets, dtypes=_DTYPES, slower=_SLOWER)


@_dispatch.register_fake("mask_cost")
def _fake(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, M = logits.shape[0], targets.shape[0]
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((N, M), (N, M), (N,), (M,)))


@_dispatch.register_fake("mask_cost_backward")
def _fake_backward(overlap: Tensor, entropy: Tensor, prob: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, overlap: Tensor, entropy: Tensor, prob: Tensor, area: Tensor) -> tuple[Tensor | None, Tensor | None]:
    logits, targets = ctx.saved_tensors
    by_logits = by_targets = None
    if ctx.needs_input_grad[0]:
        by_logits = ctx.kernels.mask_cost_backward(overlap, entropy, prob, logits, targets)
    if ctx.needs_input_grad[1]:
        x = logits.float()
        by_targets = (overlap.mT @ x.sigmoid() - entropy.mT @ x + area[:, None]).to(targets.dtype)
    return by_logits, by_targets


_dispatch.register_autograd("mask_cost", _backward, setup_context=_save)
