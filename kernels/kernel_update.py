# SPDX-License-Identifier: Apache-2.0
"""Pooling by hard masks, and the gated update of kernels in five launches (see pyvseg/ops/kernel_update.py)."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDEN = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter would multiply the bits of bfloat16 numbers
_INFINITY = tl.constexpr(float("inf"))
_PARTS = 7  # of a row of `state`: pooled in, pooled out, kernel in, kernel out, input gate, update gate, last linear


@triton.jit
def _add_selected(total, on, x, WIDEN: tl.constexpr):
    """total + on @ x, where what is off adds nothing, NaN and infinities included."""
    x = x.to(tl.float32) if WIDEN else x
    on = on.to(x.dtype)
    finite = tl.abs(x.to(tl.float32)) < _INFINITY
    total = tl.dot(on, tl.where(finite, x, 0.0).to(x.dtype), total, input_precision="ieee")
    if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
        nan = tl.dot(on, (x != x).to(x.dtype))
        high = tl.dot(on, (x == _INFINITY).to(x.dtype))
        low = tl.dot(on, (x == -_INFINITY).to(x.dtype))
        total += tl.where(nan > 0, float("nan"), 0.0) + (tl.where(high > 0, _INFINITY, 0.0) + tl.where(low > 0, -_INFINITY, 0.0))
    return total


@triton.jit
def _pool(masks, features, sums, N, M, C, slice, slices, mask_batch, mask_row, feature_batch, feature_channel, feature_pixel,
          KERNELS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * KERNELS + tl.arange(0, KERNELS)
    c = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    batch, part = (tl.program_id(2) // slices).to(tl.int64), (tl.program_id(2) % slices).to(tl.int64)
    end = tl.minimum((part + 1) * slice, M)
    total = tl.zeros((KERNELS, CHANNELS), tl.float32)
    for begin in range(part * slice, end, PIXELS):
        m = begin + tl.arange(0, PIXELS)
        mask_at = masks + batch * mask_batch + n[:, None].to(tl.int64) * mask_row + m[None, :]
        on = tl.load(mask_at, mask=(n[:, None] < N) & (m[None, :] < end), other=0).to(tl.float32) > 0
        at = features + batch * feature_batch + m[:, None] * feature_pixel + c[None, :] * feature_channel
        x = tl.load(at, mask=(m[:, None] < end) & (c[None, :] < C), other=0)
        total = _add_selected(total, on, x, WIDEN)
    out = sums + ((part * (tl.num_programs(2) // slices) + batch) * N + n[:, None]) * C + c[None, :]
    tl.store(out, total, mask=(n[:, None] < N) & (c[None, :] < C))


def mask_pool(masks: Tensor, features: Tensor) -> Tensor:
    (B, N, M), C = masks.shape, features.shape[1]
    masks = masks if masks.stride(2) == 1 or M <= 1 else masks.contiguous()
    kernels, channels, pixels = 32, 64, 64
    tiles = triton.cdiv(N, kernels) * triton.cdiv(C, channels) * B
    slices = max(1, min(512 // max(tiles, 1), triton.cdiv(M, 8 * pixels), 65535 // max(B, 1)))
    slice = triton.cdiv(max(M, 1), slices * pixels) * pixels
    sums = features.new_empty(slices, B, N, C, dtype=torch.float32)
    if tiles:
        _pool[(triton.cdiv(N, kernels), triton.cdiv(C, channels), B * slices)](
            masks, features, sums, N, M, C, slice, slices, *masks.stride()[:2], *features.stride(),
            KERNELS=kernels, CHANNELS=channels, PIXELS=pixels, WIDEN=_WIDEN, num_warps=4
        )  # fmt: skip
    return sums.sum(0) if slices > 1 else sums[0]


@triton.jit
def _pool_backward(grad, masks, out, N, M, C, mask_batch, mask_row, out_batch, out_channel, out_pixel,
                   PIXELS: tl.constexpr, CHANNELS: tl.constexpr, KERNELS: tl.constexpr):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    batch = tl.program_id(2).to(tl.int64)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for begin in range(0, N, KERNELS):
        n = begin + tl.arange(0, KERNELS)
        mask_at = masks + batch * mask_batch + n[None, :].to(tl.int64) * mask_row + m[:, None]
        on = tl.load(mask_at, mask=(n[None, :] < N) & (m[:, None] < M), other=0).to(tl.float32) > 0
        x = tl.load(grad + (batch * N + n[:, None]) * C + c[None, :], mask=(n[:, None] < N) & (c[None, :] < C), other=0)
        total = _add_selected(total, on, x, False)
    at = out + batch * out_batch + m[:, None] * out_pixel + c[None, :] * out_channel
    tl.store(at, total.to(out.dtype.element_ty), mask=(m[:, None] < M) & (c[None, :] < C))


def mask_pool_backward(grad: Tensor, masks: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    (B, N, M), C = masks.shape, grad.shape[2]
    masks = masks if masks.stride(2) == 1 or M <= 1 else masks.contiguous()
    out = grad.new_empty(B, M, C, dtype=dtype).mT if channels_last else grad.new_empty(B, C, M, dtype=dtype)
    if out.numel():
        _pool_backward[(triton.cdiv(M, 64), triton.cdiv(C, 64), B)](
            grad.contiguous(), masks, out, N, M, C, *masks.stride()[:2], *out.stride(),
            PIXELS=64, CHANNELS=64, KERNELS=32, num_warps=4
        )  # fmt: skip
    return out


@triton.jit
def _linears(a, b, weight_a, bias_a, weight_b, bias_b, state, R, C, outputs, first, stride,
             PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """state[:, first:] = a weight_a^T + bias_a, and `outputs` columns on = b weight_b^T + bias_b; PRODUCT: both of a * b."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    second = tl.program_id(2) == 1
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, C, DEPTH):
        d = begin + tl.arange(0, DEPTH)
        at = r[:, None] * stride + d[None, :]
        there = (r[:, None] < R) & (d[None, :] < C)
        weight_at = o[None, :] * C + d[:, None]
        weight_there = (o[None, :] < outputs) & (d[:, None] < C)
        if PRODUCT:
            x = tl.load(a + at, mask=there, other=0.0) * tl.load(b + at, mask=there, other=0.0)
        elif second:
            x = tl.load(b + at, mask=there, other=0.0).to(tl.float32)
        else:
            x = tl.load(a + at, mask=there, other=0.0).to(tl.float32)
        if second:
            w = tl.load(weight_b + weight_at, mask=weight_there, other=0.0)
        else:
            w = tl.load(weight_a + weight_at, mask=weight_there, other=0.0)
        if WIDEN:
            total = tl.dot(x, w.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(x.to(w.dtype), w, total, input_precision="ieee")
    if second:
        total += tl.load(bias_b + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
        first += outputs
    else:
        total += tl.load(bias_a + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(state + r[:, None] * (7 * C) + first + o[None, :], total, mask=(r[:, None] < R) & (o[None, :] < outputs))


@triton.jit
def _norm(state, norms, part: tl.constexpr, norm: tl.constexpr, r, c, R, C, eps):
    """Part `part` of the rows normalised, one over its standard deviation, the norm's gain, and the result."""
    there = (r[:, None] < R) & (c[None, :] < C)
    x = tl.load(state + (r[:, None] * 7 + part) * C + c[None, :], mask=there, other=0.0)
    centred = tl.where(c[None, :] < C, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    gain = tl.load(norms + 2 * norm * C + c, mask=c < C, other=0.0)[None, :]
    bias = tl.load(norms + (2 * norm + 1) * C + c, mask=c < C, other=0.0)[None, :]
    normal = centred * scale[:, None]
    return normal, scale, gain, normal * gain + bias


@triton.jit
def _combine(state, norms, mixed, R, C, eps, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    _, _, _, update = _norm(state, norms, 5, 0, r, c, R, C, eps)
    _, _, _, pooled = _norm(state, norms, 1, 1, r, c, R, C, eps)
    _, _, _, gate = _norm(state, norms, 4, 2, r, c, R, C, eps)
    _, _, _, kernel = _norm(state, norms, 3, 3, r, c, R, C, eps)
    result = tl.sigmoid(update) * pooled + tl.sigmoid(gate) * kernel
    tl.store(mixed + r[:, None] * C + c[None, :], result, mask=(r[:, None] < R) & (c[None, :] < C))


@triton.jit
def _finish(state, norms, out, R, C, eps, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    _, _, _, x = _norm(state, norms, 6, 4, r, c, R, C, eps)
    result = tl.where(x < 0, 0.0, x).to(out.dtype.element_ty)
    tl.store(out + r[:, None] * C + c[None, :], result, mask=(r[:, None] < R) & (c[None, :] < C))


_ROWS = 4  # of a program of the passes between the linears


def _rowwise(kernel, R: int, C: int, *args) -> None:
    kernel[(triton.cdiv(R, _ROWS),)](*args, ROWS=_ROWS, CHANNELS=triton.next_power_of_2(C), num_warps=4)


def _norms(parameters: list[Tensor]) -> Tensor:
    return torch.stack(parameters[10:]).float()


def kernel_update(pooled: Tensor, kernels: Tensor, parameters: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    R, C = kernels.shape
    out, state = kernels.new_empty(R, C), kernels.new_empty(R, _PARTS * C, dtype=torch.float32)
    if not R:
        return out, state
    linears, norms = [p.contiguous() for p in parameters[:10]], _norms(parameters)
    mixed = torch.empty_like(state[:, :C], memory_format=torch.contiguous_format)

    def multiply(a: Tensor, b: Tensor, four: list[Tensor], first: int, product: bool, count: int) -> None:
        outputs = four[0].shape[0]
        _linears[(triton.cdiv(R, 16), triton.cdiv(outputs, 64), count)](
            a, b, *four, state, R, C, outputs, first * C, a.stride(0), PRODUCT=product, ROWS=16, COLUMNS=64, DEPTH=32, WIDEN=_WIDEN
        )  # fmt: skip

    multiply(pooled.contiguous(), kernels.contiguous(), linears[:4], 0, False, 2)
    multiply(state, state[:, 2 * C :], linears[4:8], 4, True, 2)
    _rowwise(_combine, R, C, state, norms, mixed, R, C, eps)
    multiply(mixed, mixed, linears[8:] * 2, 6, False, 1)
    _rowwise(_finish, R, C, state, norms, out, R, C, eps)
    return out, state


@triton.jit
def _norm_backward(grad, normal, scale, gain, grads, sums, part: tl.constexpr, norm: tl.constexpr, r, c, R, C):
    """Writes the gradient of the norm's input, and the program's share of those of its gain and bias."""
    scaled = grad * gain
    mean, slope = tl.sum(scaled, 1) / C, tl.sum(scaled * normal, 1) / C
    result = scale[:, None] * (scaled - mean[:, None] - normal * slope[:, None])
    tl.store(grads + (r[:, None] * 7 + part) * C + c[None, :], result, mask=(r[:, None] < R) & (c[None, :] < C))
    at = sums + (tl.program_id(0).to(tl.int64) * 10 + 2 * norm) * C + c
    tl.store(at, tl.sum(grad * normal, 0), mask=c < C)
    tl.store(at + C, tl.sum(grad, 0), mask=c < C)


@triton.jit
def _finish_backward(grad, state, norms, grads, sums, R, C, eps, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    there = (r[:, None] < R) & (c[None, :] < C)
    normal, scale, gain, x = _norm(state, norms, 6, 4, r, c, R, C, eps)
    g = tl.load(grad + r[:, None] * C + c[None, :], mask=there, other=0.0).to(tl.float32)
    _norm_backward(tl.where(x <= 0, 0.0, g), normal, scale, gain, grads, sums, 6, 4, r, c, R, C)


@triton.jit
def _gates_backward(grad, state, norms, grads, sums, R, C, eps, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    there = (r[:, None] < R) & (c[None, :] < C)
    g = tl.load(grad + r[:, None] * C + c[None, :], mask=there, other=0.0)
    for i in tl.static_range(2):  # a gate and what it scales: update gate and pooled, input gate and kernel
        gate_normal, gate_scale, gate_gain, x = _norm(state, norms, 5 - i, 2 * i, r, c, R, C, eps)
        normal, scale, gain, y = _norm(state, norms, 1 + 2 * i, 2 * i + 1, r, c, R, C, eps)
        gate = tl.sigmoid(x)
        _norm_backward(g * y * gate * (1.0 - gate), gate_normal, gate_scale, gate_gain, grads, sums, 5 - i, 2 * i, r, c, R, C)
        _norm_backward(g * gate, normal, scale, gain, grads, sums, 1 + 2 * i, 2 * i + 1, r, c, R, C)


def kernel_update_backward(
    grad: Tensor, pooled: Tensor, kernels: Tensor, parameters: list[Tensor], state: Tensor, eps: float, of_parameters: bool = True
) -> list[Tensor]:
    R, C = kernels.shape
    wanted = (pooled, kernels, *(parameters if of_parameters else ()))
    if not R:
        return [torch.zeros_like(t) for t in wanted]
    norms, state = _norms(parameters), state.contiguous()
    grads, mixed = torch.empty_like(state), state.new_empty(R, C)
    sums = state.new_empty(triton.cdiv(R, _ROWS), 10, C)
    weights = [w.float() for w in parameters[:10:2]]
    _rowwise(_combine, R, C, state, norms, mixed, R, C, eps)
    _rowwise(_finish_backward, R, C, grad.contiguous(), state, norms, grads, sums, R, C, eps)
    parts, g = state.view(R, _PARTS, C), grads.view(R, _PARTS, C)
    _rowwise(_gates_backward, R, C, g[:, 6] @ weights[4], state, norms, grads, sums, R, C, eps)
    features, of_features = parts[:, 0] * parts[:, 2], g[:, 4] @ weights[2] + g[:, 5] @ weights[3]
    g[:, 0], g[:, 2] = of_features * parts[:, 2], of_features * parts[:, 0]
    outputs = [grads[:, : 2 * C], grads[:, 2 * C : 4 * C], g[:, 4], g[:, 5], g[:, 6]]
    results = [outputs[0] @ weights[0], outputs[1] @ weights[1]]
    inputs = [pooled, kernels.float(), features, features, mixed]
    if of_parameters:
        results += [t for y, x in zip(outputs, inputs, strict=True) for t in (y.T @ x, y.sum(0))]
        results += sums.sum(0).unbind()
    return [result.to(like.dtype) for result, like in zip(results, wanted, strict=True)]
