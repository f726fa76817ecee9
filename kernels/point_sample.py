# SPDX-License-Identifier: Apache-2.0
"""Bilinear samples of masks at points (see pyvseg/ops/point_sample.py)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_POINTS = 256


@triton.jit
def _axis(at, size):
    """The two pixels beside `at` in [0, 1] of an axis and their weights, 0 outside; NaN is outside."""
    x = at * size - 0.5
    inside = (x > -1.0) & (x < size)
    x = tl.where(inside, x, 0.0)
    right = (x + 1.0).to(tl.int32)
    fraction = x - (right - 1).to(tl.float32)
    return right - 1, right, tl.where(inside & (right > 0) & (right <= size), 1.0 - fraction, 0.0), tl.where(inside & (right < size), fraction, 0.0)


@triton.jit
def _corner(samples, masks, x, y, width, weight):
    value = tl.load(masks + y * width + x, mask=weight != 0, other=0).to(tl.float32)
    return samples + weight * value


@triton.jit
def _sample(masks, points, samples, planes_per_set, K, height, width, POINTS: tl.constexpr):
    plane = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * POINTS + tl.arange(0, POINTS)
    at = points + (plane // planes_per_set * K + k) * 2
    left, right, wl, wr = _axis(tl.load(at, mask=k < K, other=-1.0), width)
    top, bottom, wt, wb = _axis(tl.load(at + 1, mask=k < K, other=-1.0), height)
    masks += plane * height * width
    total = _corner(tl.zeros((POINTS,), tl.float32), masks, left, top, width, wl * wt)
    total = _corner(total, masks, right, top, width, wr * wt)
    total = _corner(total, masks, left, bottom, width, wl * wb)
    total = _corner(total, masks, right, bottom, width, wr * wb)
    tl.store(samples + plane * K + k, total.to(samples.dtype.element_ty), mask=k < K)


def _sets(planes: int, sets: int) -> int:
    """How many planes in a row share a set of points."""
    return max(1, planes // sets)


def point_sample(masks: Tensor, points: Tensor) -> Tensor:
    N, T, H, W = masks.shape
    K = points.shape[1]
    samples = masks.new_zeros(N, T, K, dtype=torch.float32 if masks.dtype == torch.bool else masks.dtype)
    if samples.numel() and H * W:
        planes = masks.contiguous()
        planes = planes.view(torch.uint8) if planes.dtype == torch.bool else planes
        _sample[(N * T, triton.cdiv(K, _POINTS))](
            planes, points.contiguous(), samples, _sets(N * T, points.shape[0]), K, H, W, POINTS=_POINTS, num_warps=4
        )  # fmt: skip
    return samples


@triton.jit
def _scatter(masks, x, y, width, weight, grad):
    tl.atomic_add(masks + y * width + x, weight * grad, mask=weight != 0)


@triton.jit
def _backward(grad, points, masks, planes_per_set, K, height, width, POINTS: tl.constexpr):
    plane = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * POINTS + tl.arange(0, POINTS)
    at = points + (plane // planes_per_set * K + k) * 2
    left, right, wl, wr = _axis(tl.load(at, mask=k < K, other=-1.0), width)
    top, bottom, wt, wb = _axis(tl.load(at + 1, mask=k < K, other=-1.0), height)
    value = tl.load(grad + plane * K + k, mask=k < K, other=0).to(tl.float32)
    masks += plane * height * width
    _scatter(masks, left, top, width, wl * wt, value)
    _scatter(masks, right, top, width, wr * wt, value)
    _scatter(masks, left, bottom, width, wl * wb, value)
    _scatter(masks, right, bottom, width, wr * wb, value)


def point_sample_backward(grad: Tensor, points: Tensor, height: int, width: int) -> Tensor:
    N, T, K = grad.shape
    if torch.are_deterministic_algorithms_enabled():
        return _ordered_backward(grad, points, height, width)
    masks = grad.new_zeros(N, T, height, width, dtype=torch.float32)
    if grad.numel() and height * width:
        _backward[(N * T, triton.cdiv(K, _POINTS))](
            grad.contiguous(), points.contiguous(), masks, _sets(N * T, points.shape[0]), K, height, width, POINTS=_POINTS, num_warps=4
        )  # fmt: skip
    return masks.to(grad.dtype)


def _ordered_backward(grad: Tensor, points: Tensor, height: int, width: int) -> Tensor:
    """Without float atomics: PyTorch sorts by pixel."""
    N, T, K = grad.shape
    position = points * points.new_tensor([width, height]) - 0.5  # x, y
    first = position.floor()
    masks = grad.new_zeros(N * T, height * width, dtype=torch.float32)
    plane = torch.arange(N * T, device=grad.device)[:, None].expand(N * T, K)
    for dx in (0, 1):
        for dy in (0, 1):
            corner = first + points.new_tensor([dx, dy])
            inside = ((corner >= 0) & (corner < points.new_tensor([width, height]))).all(-1)
            weight = torch.where(inside, (1 - (position - corner).abs()).prod(-1), 0.0)
            pixel = torch.where(inside, corner[..., 1] * width + corner[..., 0], 0.0).long().expand(N, K)
            values = grad.float() * weight[:, None]
            masks.index_put_((plane, pixel.repeat_interleave(T, 0)), values.reshape(N * T, K), accumulate=True)
    return masks.reshape(N, T, height, width).to(grad.dtype)
