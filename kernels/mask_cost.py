# SPDX-License-Identifier: Apache-2.0
"""Sums behind the matching costs (see pyvseg/ops/mask_cost.py): sigmoid, softplus and both products in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIXELS = 64  # of one step


@triton.jit
def _activate(x):
    """Sigmoid and softplus from one exponential."""
    e = tl.exp(-tl.abs(x))
    one = 1.0 + e
    logarithm = tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))  # log1p, small e included
    return tl.where(x < 0, e, 1.0) / one, tl.where(x < 0, 0.0, x) + logarithm


@triton.jit
def _forward(logits, targets, overlap, entropy, prob, area, N, M, P, slice, logit_stride, target_stride,
             ROWS: tl.constexpr, TARGETS: tl.constexpr, PIXELS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target = tl.program_id(1).to(tl.int64) * TARGETS + tl.arange(0, TARGETS)
    part = tl.program_id(2).to(tl.int64)
    end = tl.minimum((part + 1) * slice, P)
    products = tl.zeros((ROWS, TARGETS), tl.float32)
    crosses = tl.zeros((ROWS, TARGETS), tl.float32)
    probs = tl.zeros((ROWS,), tl.float32)
    softpluses = tl.zeros((ROWS,), tl.float32)
    areas = tl.zeros((TARGETS,), tl.float32)
    for begin in range(part * slice, end, PIXELS):
        at = begin + tl.arange(0, PIXELS)
        x_there = (row[:, None] < N) & (at[None, :] < end)
        x = tl.load(logits + row[:, None] * logit_stride + at[None, :], mask=x_there, other=0).to(tl.float32)
        t_there = (target[:, None] < M) & (at[None, :] < end)
        t = tl.load(targets + target[:, None] * target_stride + at[None, :], mask=t_there, other=0).to(tl.float32)
        sigmoid, softplus = _activate(x)
        sigmoid = tl.where(x_there, sigmoid, 0.0)
        products = tl.dot(sigmoid, tl.trans(t), products, input_precision="ieee")
        crosses = tl.dot(x, tl.trans(t), crosses, input_precision="ieee")
        probs += tl.sum(sigmoid, 1)
        softpluses += tl.sum(tl.where(x_there, softplus, 0.0), 1)
        areas += tl.sum(t, 1)
    out = part * N * M + row[:, None] * M + target[None, :]
    inside = (row[:, None] < N) & (target[None, :] < M)
    tl.store(overlap + out, products, mask=inside)
    tl.store(entropy + out, softpluses[:, None] - crosses, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(prob + part * N + row, probs, mask=row < N)
    if tl.program_id(0) == 0:
        tl.store(area + part * M + target, areas, mask=target < M)


def _rows(masks: Tensor) -> Tensor:
    masks = masks if masks.stride(1) == 1 or masks.shape[1] <= 1 else masks.contiguous()
    return masks.view(torch.uint8) if masks.dtype == torch.bool else masks


def mask_cost(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (N, P), M = logits.shape, targets.shape[0]
    x, t = _rows(logits), _rows(targets)
    rows, columns = 32, max(16, min(64, triton.next_power_of_2(M)))
    tiles = (max(1, triton.cdiv(N, rows)), max(1, triton.cdiv(M, columns)))
    slices = max(1, min(512 // (tiles[0] * tiles[1]), triton.cdiv(P, 16 * _PIXELS)))
    slice = triton.cdiv(max(P, 1), slices * _PIXELS) * _PIXELS
    sums = [logits.new_empty(slices, *shape, dtype=torch.float32) for shape in ((N, M), (N, M), (N,), (M,))]
    if N or M:
        _forward[(*tiles, slices)](
            x, t, *sums, N, M, P, slice, x.stride(0), t.stride(0), ROWS=rows, TARGETS=columns, PIXELS=_PIXELS, num_warps=4
        )  # fmt: skip
    return tuple(part.sum(0) for part in sums)


@triton.jit
def _backward(overlap, entropy, prob, logits, targets, grad, N, M, P, logit_stride, target_stride,
              ROWS: tl.constexpr, TARGETS: tl.constexpr, PIXELS: tl.constexpr):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    by_overlap = tl.zeros((ROWS, PIXELS), tl.float32)
    by_entropy = tl.zeros((ROWS, PIXELS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, M, TARGETS):
        target = first + tl.arange(0, TARGETS)
        pair = row[:, None] * M + target[None, :]
        there = (row[:, None] < N) & (target[None, :] < M)
        o = tl.load(overlap + pair, mask=there, other=0.0)
        e = tl.load(entropy + pair, mask=there, other=0.0)
        t_there = (target[:, None] < M) & (at[None, :] < P)
        t = tl.load(targets + target[:, None].to(tl.int64) * target_stride + at[None, :], mask=t_there, other=0).to(tl.float32)
        by_overlap = tl.dot(o, t, by_overlap, input_precision="ieee")
        by_entropy = tl.dot(e, t, by_entropy, input_precision="ieee")
        total += tl.sum(e, 1)
    there = (row[:, None] < N) & (at[None, :] < P)
    x = tl.load(logits + row[:, None] * logit_stride + at[None, :], mask=there, other=0).to(tl.float32)
    e = tl.exp(-tl.abs(x))
    inverse = 1.0 / (1.0 + e)
    sigmoid = tl.where(x < 0, e, 1.0) * inverse
    p = tl.load(prob + row, mask=row < N, other=0.0)
    result = e * inverse * inverse * (by_overlap + p[:, None]) + (total[:, None] * sigmoid - by_entropy)
    tl.store(grad + row[:, None] * P + at[None, :], result.to(grad.dtype.element_ty), mask=there)


def mask_cost_backward(overlap: Tensor, entropy: Tensor, prob: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    (N, P), M = logits.shape, targets.shape[0]
    x, t = _rows(logits), _rows(targets)
    grad = logits.new_empty(N, P)
    if grad.numel():
        _backward[(triton.cdiv(P, 128), triton.cdiv(N, 32))](
            overlap.contiguous(), entropy.contiguous(), prob.contiguous(), x, t, grad, N, M, P, x.stride(0), t.stride(0),
            ROWS=32, TARGETS=16, PIXELS=128, num_warps=4
        )  # fmt: skip
    return grad
