# SPDX-License-Identifier: Apache-2.0
"""Bilinear samples of masks at points, as PointRend and Mask2Former take them for costs and losses."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg.ops import _dispatch

__all__ = ["point_sample"]

_FEW = 1 << 10  # samples whose gradient PyTorch is quicker at, whatever the size of the masks
_DTYPES = (*_dispatch.DTYPES, torch.bool)


def point_sample(
    masks: Tensor,  # (N, *T, H, W) floating point or bool
    points: Tensor,  # (K, 2) for all masks or (N, K, 2) for each; x, y in [0, 1]
    *,
    backend: str = "auto",
) -> Tensor:  # (N, *T, K) in masks' dtype, float32 for bool
    """Samples every mask, and every frame T of it, at the points.

    (0, 0) is the top left corner of the top left pixel, whose centre is at (0.5 / W, 0.5 / H). Outside is zero; points
    outside or NaN give what lies there. Equal to `grid_sample(masks, 2 * points - 1, align_corners=False)` without its copies
    of the points. Differentiable in masks, not in points; deterministic.

    Raises ValueError for shapes and devices, TypeError for dtypes, naming the argument.
    """
    choice = _plan(masks, points, backend)
    planes = masks if masks.ndim == 4 else masks.reshape(masks.shape[0], masks.shape[1:-2].numel(), *masks.shape[-2:])
    if choice == "reference":
        samples = reference(planes, points)
    else:
        sets = points.detach() if points.ndim == 3 else points.detach()[None]
        samples = _dispatch.call(choice, "point_sample", planes, sets.float())
    return samples if masks.ndim == 4 else samples.reshape(*masks.shape[:-2], points.shape[-2])


def reference(masks: Tensor, points: Tensor) -> Tensor:
    """(N, T, H, W), (K, 2) or (N, K, 2) -> (N, T, K)"""
    masks = masks.float() if masks.dtype == torch.bool else masks
    (N, T, H, W), K = masks.shape, points.shape[-2]
    if 0 in (N, T, H, W, K):
        return masks.flatten()[:0].sum() + masks.new_zeros(N, T, K)
    grid = (2 * points.to(masks.dtype) - 1).expand(N, K, 2)[:, :, None]
    return F.grid_sample(masks, grid, align_corners=False)[..., 0]


@_dispatch.planned
def _plan(masks: Tensor, points: Tensor, backend: str) -> str:
    for name, tensor in (("masks", masks), ("points", points)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point() and (tensor.dtype != torch.bool or tensor is points):
            raise TypeError(f"{name} must be floating point{' or bool' * (tensor is masks)}, got {tensor.dtype}")
    if masks.ndim < 3:
        raise ValueError(f"masks must be (N, *T, H, W), got shape {tuple(masks.shape)}")
    if masks.shape[-2:].numel() >= 1 << 31:
        raise ValueError(f"masks must have fewer than 2^31 pixels a frame, got {tuple(masks.shape)}")
    if points.shape[-1:] != (2,) or points.ndim not in (2, 3) or points.shape[:-2] not in ((), masks.shape[:1]):
        raise ValueError(f"points must be (K, 2) or (N={masks.shape[0]}, K, 2), got shape {tuple(points.shape)}")
    if points.device != masks.device:
        raise ValueError(f"points is on {points.device} but masks on {masks.device}")
    few = math.inf if masks.shape[:-2].numel() * points.shape[-2] <= _FEW else 0
    return _dispatch.choose("point_sample", backend, masks, dtypes=_DTYPES, slower="3 to 10 times", few=few)


@_dispatch.register_fake("point_sample")
def _fake(masks: Tensor, points: Tensor) -> Tensor:
    dtype = torch.float32 if masks.dtype == torch.bool else masks.dtype
    return masks.new_empty(*masks.shape[:2], points.shape[1], dtype=dtype)


@_dispatch.register_fake("point_sample_backward")
def _fake_backward(grad: Tensor, points: Tensor, height: int, width: int) -> Tensor:
    return grad.new_empty(*grad.shape[:2], height, width)


def _save(ctx, inputs, output) -> None:
    masks, points = inputs
    ctx.size = masks.shape[2:]
    ctx.save_for_backward(points)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    return ctx.kernels.point_sample_backward(grad, *ctx.saved_tensors, *ctx.size), None


_dispatch.register_autograd("point_sample", _backward, setup_context=_save)
