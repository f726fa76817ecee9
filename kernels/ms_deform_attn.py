# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention in Triton; the definition is in pyvseg/ops/ms_deform_attn.py.

A program serves some neighbouring queries of one head: rows of a tile are queries, columns channels. It goes through the
samples one by one and gathers the four pixels around each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _axis(x, size):
    """Two neighbouring pixels of a map around each x, by the first of them, x less that pixel, and both weights.

    A pixel that is no neighbour of x weighs nothing; NaN and infinity weigh nothing.
    """
    last = tl.maximum(size - 2, 0).to(tl.float32)
    first = tl.floor(x)
    first = tl.where(first > 0, first, 0.0)  # also for NaN
    first = tl.where(first < last, first, last)
    past = x - first
    near, far, pixels = 1 - tl.abs(past), 1 - tl.abs(past - 1), tl.zeros_like(x) + size
    near, far = tl.where((near > 0) & (pixels > 0), near, 0.0), tl.where((far > 0) & (pixels > 1), far, 0.0)
    return first.to(tl.int32), past, near, far


@triton.jit
def _slopes(past, size):
    """Derivatives of both weights; at a pixel's centre, those of larger x."""
    near = tl.where((past >= 0) & (past < 1), -1.0, tl.where((past >= -1) & (past < 0), 1.0, 0.0))
    far = tl.where((past >= 0) & (past < 1), 1.0, tl.where((past >= 1) & (past < 2), -1.0, 0.0))
    return near, tl.where(tl.zeros_like(past) + size > 1, far, 0.0)


@triton.jit
def _position(locations, reference, sample, point, height, width, P, coordinates: tl.constexpr, live):
    """Pixel coordinates (x, y) of samples; coordinates is 0 where `locations` holds locations, else offsets."""
    x = tl.load(locations + 2 * sample, live, 0.0).to(tl.float32)
    y = tl.load(locations + 2 * sample + 1, live, 0.0).to(tl.float32)
    if coordinates == 0:
        x, y = x * width - 0.5, y * height - 0.5
    else:
        at = reference + coordinates * point
        centre_x, centre_y = tl.load(at, live, 0.0).to(tl.float32), tl.load(at + 1, live, 0.0).to(tl.float32)
        if coordinates == 2:
            x, y = centre_x * width + x - 0.5, centre_y * height + y - 0.5
        else:
            half = 0.5 / P
            box_x, box_y = tl.load(at + 2, live, 0.0).to(tl.float32), tl.load(at + 3, live, 0.0).to(tl.float32)
            x, y = (centre_x + x * box_x * half) * width - 0.5, (centre_y + y * box_y * half) * height - 0.5
    return x, y


@triton.jit
def _place(Q, H, QUERIES: tl.constexpr):
    """This program's image, head and queries."""
    block, head = tl.program_id(0) // H, tl.program_id(0) % H
    tiles = tl.cdiv(Q, QUERIES)
    return (block // tiles).to(tl.int64), head, block % tiles * QUERIES + tl.arange(0, QUERIES)


@triton.jit
def _forward(
    value, locations, weights, reference, out, shapes, S, Q, H, D, P,
    L: tl.constexpr, coordinates: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, head, q = _place(Q, H, QUERIES)
    query = image * Q + q
    live = q < Q
    row = query * H + head
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    keep = live[:, None] & (channel < D)[None, :]
    maps = value + image * S * H * D + head * D + channel[None, :]

    peak = tl.zeros([QUERIES], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if coordinates > 0:
        peak += float("-inf")
        for s in range(L * P):
            peak = tl.maximum(peak, tl.load(weights + row * (L * P) + s, live, 0.0).to(tl.float32))
    sums = tl.zeros([QUERIES, CHANNELS], tl.float32)
    first = 0
    for level in tl.static_range(L):
        height, width = tl.full((), shapes[2 * level], tl.int32), tl.full((), shapes[2 * level + 1], tl.int32)
        right, down = (width > 1).to(tl.int64) * H * D, (height > 1).to(tl.int64) * width * H * D
        for point in range(P):
            sample = row * (L * P) + level * P + point
            px, py = _position(locations, reference, sample, query * L + level, height, width, P, coordinates, live)
            x, _, x_near, x_far = _axis(px, width)
            y, _, y_near, y_far = _axis(py, height)
            weight = tl.load(weights + sample, live, 0.0).to(tl.float32)
            if coordinates > 0:
                weight = tl.exp(weight - peak)
                total += weight
            inside = (x_near + x_far > 0) & (y_near + y_far > 0)
            mask = keep & inside[:, None]
            at = maps + (first + y * width + x).to(tl.int64)[:, None] * (H * D)
            near, far = weight * y_near, weight * y_far
            sums += tl.where(mask, (near * x_near)[:, None] * tl.load(at, mask, 0.0).to(tl.float32), 0.0)
            sums += tl.where(mask, (near * x_far)[:, None] * tl.load(at + right, mask, 0.0).to(tl.float32), 0.0)
            sums += tl.where(mask, (far * x_near)[:, None] * tl.load(at + down, mask, 0.0).to(tl.float32), 0.0)
            sums += tl.where(mask, (far * x_far)[:, None] * tl.load(at + right + down, mask, 0.0).to(tl.float32), 0.0)
        first += height * width
    if coordinates > 0:
        sums /= total[:, None]
    tl.store(out + row[:, None] * D + channel[None, :], sums.to(out.dtype.element_ty), keep)


@triton.jit
def _add(sums, x, units, mask, FIXED: tl.constexpr):
    """sums += x, in units of 1 / units where those are fixed-point numbers, whose sum does not depend on the order."""
    if FIXED:
        tl.atomic_add(sums, tl.floor(x * units + 0.5).to(tl.int64), mask, sem="relaxed")
    else:
        tl.atomic_add(sums, x, mask, sem="relaxed")


@triton.jit
def _backward(
    grad, value, locations, weights, reference, grad_value, grad_locations, grad_weights, along, units_at, shapes, S, Q, H, D, P,
    L: tl.constexpr, coordinates: tl.constexpr, FIXED: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, head, q = _place(Q, H, QUERIES)
    query = image * Q + q
    live = q < Q
    row = query * H + head
    maps = image * S * H * D + head * D
    units = tl.load(units_at) if FIXED else 1.0
    first = 0
    for level in tl.static_range(L):
        height, width = tl.full((), shapes[2 * level], tl.int32), tl.full((), shapes[2 * level + 1], tl.int32)
        right, down = (width > 1).to(tl.int64) * H * D, (height > 1).to(tl.int64) * width * H * D
        for point in range(P):
            sample = row * (L * P) + level * P + point
            px, py = _position(locations, reference, sample, query * L + level, height, width, P, coordinates, live)
            x, x_past, x_near, x_far = _axis(px, width)
            y, y_past, y_near, y_far = _axis(py, height)
            weight = tl.load(weights + sample, live, 0.0).to(tl.float32)
            inside = live & (x_near + x_far > 0) & (y_near + y_far > 0)
            at = maps + (first + y * width + x).to(tl.int64)[:, None] * (H * D)
            near, far = weight * y_near, weight * y_far
            near_near = tl.zeros([QUERIES], tl.float32)
            near_far = tl.zeros([QUERIES], tl.float32)
            far_near = tl.zeros([QUERIES], tl.float32)
            far_far = tl.zeros([QUERIES], tl.float32)
            for chunk in range(0, D, CHANNELS):
                channel = (chunk + tl.arange(0, CHANNELS))[None, :]
                mask = inside[:, None] & (channel < D)
                g = tl.load(grad + row[:, None] * D + channel, mask, 0.0).to(tl.float32)
                i = at + channel
                near_near += tl.sum(g * tl.load(value + i, mask, 0.0).to(tl.float32), 1)
                near_far += tl.sum(g * tl.load(value + i + right, mask, 0.0).to(tl.float32), 1)
                far_near += tl.sum(g * tl.load(value + i + down, mask, 0.0).to(tl.float32), 1)
                far_far += tl.sum(g * tl.load(value + i + right + down, mask, 0.0).to(tl.float32), 1)
                _add(grad_value + i, (near * x_near)[:, None] * g, units, mask & (near * x_near != 0)[:, None], FIXED)
                _add(grad_value + i + right, (near * x_far)[:, None] * g, units, mask & (near * x_far != 0)[:, None], FIXED)
                _add(grad_value + i + down, (far * x_near)[:, None] * g, units, mask & (far * x_near != 0)[:, None], FIXED)
                _add(grad_value + i + right + down, (far * x_far)[:, None] * g, units, mask & (far * x_far != 0)[:, None], FIXED)
            x_near_slope, x_far_slope = _slopes(x_past, width)
            y_near_slope, y_far_slope = _slopes(y_past, height)
            upper, lower = x_near * near_near + x_far * near_far, x_near * far_near + x_far * far_far
            upper_slope = x_near_slope * near_near + x_far_slope * near_far
            lower_slope = x_near_slope * far_near + x_far_slope * far_far
            x_grad = tl.where(inside, weight * (y_near * upper_slope + y_far * lower_slope), 0.0)
            y_grad = tl.where(inside, weight * (y_near_slope * upper + y_far_slope * lower), 0.0)
            tl.store(grad_weights + sample, tl.where(inside, y_near * upper + y_far * lower, 0.0), live)
            if coordinates > 0:
                tl.store(along + 2 * sample, x_grad * width, live)
                tl.store(along + 2 * sample + 1, y_grad * height, live)
            if coordinates == 0:
                x_grad, y_grad = x_grad * width, y_grad * height
            elif coordinates == 4:
                box = reference + 4 * (query * L + level) + 2
                x_grad *= width * tl.load(box, live, 0.0).to(tl.float32) * (0.5 / P)
                y_grad *= height * tl.load(box + 1, live, 0.0).to(tl.float32) * (0.5 / P)
            tl.store(grad_locations + 2 * sample, x_grad.to(grad_locations.dtype.element_ty), live)
            tl.store(grad_locations + 2 * sample + 1, y_grad.to(grad_locations.dtype.element_ty), live)
        first += height * width


def ms_deform_attn(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return _attend(value, shapes, locations, weights, None)


def ms_deform_attn_fused(value: Tensor, shapes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    return _attend(value, shapes, offsets, logits, reference.contiguous())


def ms_deform_attn_backward(
    grad: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_value, grad_locations, grad_weights, _ = _differentiate(grad, value, shapes, locations, weights, None, deterministic)
    return grad_value, grad_locations, grad_weights.to(weights.dtype)


def ms_deform_attn_fused_backward(
    grad: Tensor, value: Tensor, shapes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = logits.float().flatten(3).softmax(-1).view_as(logits)
    grad_value, grad_offsets, grad_weights, along = _differentiate(grad, value, shapes, offsets, weights, reference.contiguous(), deterministic)
    shared = (weights * grad_weights).sum((3, 4), keepdim=True)
    grad_reference = along.sum((2, 4))
    if reference.shape[-1] == 4:
        size = (along * offsets.float()).sum((2, 4)) * (0.5 / offsets.shape[4])
        grad_reference = torch.cat([grad_reference, size], -1)
    return grad_value, grad_reference.to(reference.dtype), grad_offsets, (weights * (grad_weights - shared)).to(logits.dtype)


def _attend(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, reference: Tensor | None) -> Tensor:
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    B, S, H, D = value.shape
    _, Q, _, L, P = weights.shape
    out = value.new_empty(B, Q, H * D)
    if out.numel() == 0:
        return out
    channels, queries = _tile(value, 16 // value.element_size())
    grid = (B * H * triton.cdiv(Q, queries), triton.cdiv(D, channels))
    _forward[grid](
        value, locations, weights, reference, out, tuple(shapes), S, Q, H, D, P,
        L=L, coordinates=0 if reference is None else reference.shape[-1],
        QUERIES=queries, CHANNELS=channels, num_warps=4,
    )  # fmt: skip
    return out


def _differentiate(
    grad: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, reference: Tensor | None, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of value, locations (or offsets) and weights (float32); with a reference also of the normalised locations."""
    grad, value, locations, weights = grad.contiguous(), value.contiguous(), locations.contiguous(), weights.contiguous()
    B, S, H, D = value.shape
    _, Q, _, L, P = weights.shape
    sums = torch.zeros(value.shape, dtype=torch.int64 if deterministic else torch.float32, device=value.device)
    grad_locations, grad_weights = torch.zeros_like(locations), torch.zeros_like(weights, dtype=torch.float32)
    along = None if reference is None else torch.zeros_like(locations, dtype=torch.float32)
    if grad.numel() == 0 or weights.numel() == 0:
        return torch.zeros_like(value), grad_locations, grad_weights, along
    units = _units(grad, weights) if deterministic else None
    channels, queries = _tile(value, 4)
    _backward[(B * H * triton.cdiv(Q, queries),)](
        grad, value, locations, weights, reference, sums, grad_locations, grad_weights, along, units, tuple(shapes), S, Q, H, D, P,
        L=L, coordinates=0 if reference is None else reference.shape[-1], FIXED=deterministic,
        QUERIES=queries, CHANNELS=channels, num_warps=4,
    )  # fmt: skip
    grad_value = sums.to(value.dtype) if units is None else torch.where(units > 0, sums / units.double(), torch.nan).to(value.dtype)
    return grad_value, grad_locations, grad_weights, along


def _units(grad: Tensor, weights: Tensor) -> Tensor:
    """Units per 1 of the fixed-point sums: the largest power of two with which no sum of contributions reaches 2^61.

    A pixel gets at most Q * P contributions, each at most max |grad| * max |weight|. 0 where these are not finite: the
    whole gradient is NaN then.
    """
    bound = grad.abs().amax().float() * weights.abs().amax().float()
    most = (weights.shape[1] * weights.shape[4] - 1).bit_length()
    exponent = (60 - most - torch.frexp(bound).exponent).clamp(max=126)
    return torch.where(bound.isfinite(), torch.ldexp(torch.ones_like(bound), exponent), 0.0)


def _tile(value: Tensor, each: int) -> tuple[int, int]:
    """Channels and queries of a program whose 128 threads hold `each` channels of a query."""
    channels = min(triton.next_power_of_2(value.shape[3]), 128)
    return channels, max(128 * each // channels, 1)
