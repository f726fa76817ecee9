# SPDX-License-Identifier: Apache-2.0
"""k-means attention: assignment by matrix product and maximum in registers, sums by one-hot products in tiles.

The one-hot matrix exists for a tile of positions only, where it turns the sums into a product for tensor cores: at 128
clusters that takes a fraction of the time that reading the values does. Positions are cut into splits by the sizes alone;
their sums are added up in order, so that results are deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvseg.kernels.product import dot, product, thirds

PROGRAMS = 128  # of the sums, about one for each multiprocessor of a large GPU


@triton.jit
def _larger(logit, n, N, best, cluster):
    """The best of (clusters, positions) logits and of what was best before: NaN above all, the first of equals."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    key = tl.where(logit != logit, 0x7FFFFFFF, key)
    key = tl.where(n[:, None] < N, key, -0x80000000)
    most = tl.max(key, axis=0)
    first = tl.min(tl.where(key == most[None, :], n[:, None], 0x7FFFFFFF), axis=0)
    return tl.maximum(most, best), tl.where(most > best, first, cluster)


@triton.jit
def _assign_kernel(
    pixel, clusters, scale, bias, assign, logits, C, M, N, pixel_b, pixel_c, pixel_m, clusters_b, clusters_n, clusters_c,
    scale_n, bias_n, WANT_LOGITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of positions against all clusters."""
    tiles = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    m = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel += b * pixel_b + m[None, :] * pixel_m
    best = tl.full((BLOCK_M,), -0x80000000, tl.int32)
    cluster = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        rows = clusters + b * clusters_b + n[:, None].to(tl.int64) * clusters_n
        logit = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, C, BLOCK_C):
            c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
            x = tl.load(rows + c[None, :] * clusters_c, mask=(n[:, None] < N) & (c[None, :] < C), other=0.0)
            y = tl.load(pixel + c[:, None] * pixel_c, mask=(c[:, None] < C) & (m[None, :] < M), other=0.0)
            logit = product(x, y, logit)
        logit *= tl.load(scale + n * scale_n, mask=n < N, other=0.0)[:, None]
        logit += tl.load(bias + n * bias_n, mask=n < N, other=0.0)[:, None]
        if WANT_LOGITS:
            out = logits + (b * N + n[:, None]) * M + m[None, :]
            tl.store(out, logit.to(logits.dtype.element_ty), mask=(n[:, None] < N) & (m[None, :] < M))
        best, cluster = _larger(logit, n, N, best, cluster)
    tl.store(assign + b * M + m, cluster, mask=m < M)


@triton.jit
def _largest_kernel(logits, assign, M, N, logits_b, logits_n, logits_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The assignment of a tile of positions from logits."""
    tiles = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    m = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    best = tl.full((BLOCK_M,), -0x80000000, tl.int32)
    cluster = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        at = logits + b * logits_b + n[:, None].to(tl.int64) * logits_n + m[None, :] * logits_m
        logit = tl.load(at, mask=(n[:, None] < N) & (m[None, :] < M), other=0.0).to(tl.float32)
        best, cluster = _larger(logit, n, N, best, cluster)
    tl.store(assign + b * M + m, cluster, mask=m < M)


@triton.jit
def _pool_kernel(
    assign, value, sums, counts, D, M, N, splits, length, value_b, value_d, value_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of one split of the positions, for a block of clusters and of channels."""
    b = (tl.program_id(0) // splits).to(tl.int64)
    begin = (tl.program_id(0) % splits).to(tl.int64) * length
    end = tl.minimum(begin + length, M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = (tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    assign += b * M
    value += b * value_b + d[None, :] * value_d
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    count = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, length, BLOCK_M):
        m = begin + start + tl.arange(0, BLOCK_M)
        own = tl.load(assign + m, mask=m < end, other=-1)
        x = tl.load(value + m[:, None] * value_m, mask=(m[:, None] < end) & (d[None, :] < D), other=0.0)
        hot = n[:, None] == own[None, :]
        count += tl.sum(hot.to(tl.float32), axis=1)
        if x.dtype == tl.float32:  # each third times one or zero is exact
            high, middle, low = thirds(x)
            one_hot = tl.where(hot, 1.0, 0.0).to(tl.bfloat16)
            total = dot(one_hot, low, total)
            total = dot(one_hot, middle, total)
            total = dot(one_hot, high, total)
        else:
            total = dot(tl.where(hot, 1.0, 0.0).to(x.dtype), x, total)
    if tl.min((tl.abs(total) < float("inf")).to(tl.int32)) == 0:
        # Zero times a value that is not finite is NaN, in clusters that do not own it: once more, one by one.
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for i in range(0, length):
            m = begin + i + tl.zeros((1,), tl.int64)
            own = tl.load(assign + m, mask=m < end, other=-1)
            x = tl.load(value + m[:, None] * value_m, mask=(m[:, None] < end) & (d[None, :] < D), other=0.0)
            total += tl.where(n[:, None] == own[None, :], x.to(tl.float32), 0.0)
    row = tl.program_id(0).to(tl.int64) * N + n
    tl.store(sums + row[:, None] * D + d[None, :], total, mask=(n[:, None] < N) & (d[None, :] < D))
    if tl.program_id(2) == 0:
        tl.store(counts + row, count, mask=n < N)


@triton.jit
def _add_up_kernel(sums, update, size, splits, BLOCK: tl.constexpr):
    """(B, splits, size) -> (B, size)"""
    blocks = tl.cdiv(size, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        total += tl.load(sums + (b * splits + split) * size + i, mask=i < size, other=0.0)
    tl.store(update + b * size + i, total, mask=i < size)


@triton.jit
def _gather_kernel(rows, assign, out, D, M, N, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Every position's row of its cluster, zeros where it has none."""
    tiles = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    m = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    own = tl.load(assign + b * M + m, mask=m < M, other=-1).to(tl.int64)
    there = (own >= 0) & (own < N)
    x = tl.load(rows + (b * N + own[:, None]) * D + d[None, :], mask=there[:, None] & (d[None, :] < D), other=0.0)
    tl.store(out + (b * D + d[:, None]) * M + m[None, :], tl.trans(x), mask=(d[:, None] < D) & (m[None, :] < M))


def _block(size: int, most: int) -> int:
    """The power of two that holds the size, as far as products of 16 and `most` allow."""
    return max(16, min(most, triton.next_power_of_2(max(size, 1))))


def kmeans_attn(
    pixel: Tensor, clusters: Tensor, value: Tensor, scale: Tensor | None, bias: Tensor | None, want_logits: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, C, M), N = pixel.shape, clusters.shape[1]
    scale = pixel.new_ones(1, dtype=torch.float32) if scale is None else scale
    bias = pixel.new_zeros(1, dtype=torch.float32) if bias is None else bias
    assign = pixel.new_empty(B, M, dtype=torch.int32)
    logits = pixel.new_empty((B, N, M) if want_logits else (0,))
    wide = pixel.element_size() == 4  # six products: smaller tiles, or registers do not suffice
    BLOCK_M = _block(M, 32 if wide else 64)
    if B * M:
        _assign_kernel[(B * triton.cdiv(M, BLOCK_M),)](
            pixel, clusters, scale, bias, assign, logits, C, M, N, *pixel.stride(), *clusters.stride(),
            int(scale.shape[0] > 1), int(bias.shape[0] > 1), WANT_LOGITS=want_logits,
            BLOCK_M=BLOCK_M, BLOCK_N=_block(N, 128), BLOCK_C=_block(C, 32 if wide else 64),
            num_warps=8 if wide else 4, num_stages=2 if wide else 3,
        )  # fmt: skip
    update, count = kmeans_pool(assign, value, N)
    return update, assign, count, logits


def kmeans_assign(logits: Tensor) -> Tensor:
    B, N, M = logits.shape
    assign = logits.new_empty(B, M, dtype=torch.int32)
    if B * M:
        _largest_kernel[(B * triton.cdiv(M, 128),)](logits, assign, M, N, *logits.stride(), BLOCK_M=128, BLOCK_N=_block(N, 32))
    return assign


def kmeans_pool(assign: Tensor, value: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    (B, D, M), N, assign = value.shape, clusters, assign.contiguous()
    if B * M * N == 0:
        return value.new_zeros(B, N, D, dtype=torch.float32), value.new_zeros(B, N, dtype=torch.float32)
    BLOCK_M, BLOCK_N, BLOCK_D = _block(M, 64), _block(N, 128), _block(D, 32 if value.element_size() == 4 else 64)
    across = (triton.cdiv(N, BLOCK_N), max(triton.cdiv(D, BLOCK_D), 1))
    splits = max(1, min(PROGRAMS // (B * across[0] * across[1]), triton.cdiv(M, 2 * BLOCK_M)))
    length = triton.cdiv(triton.cdiv(M, splits), BLOCK_M) * BLOCK_M
    splits = triton.cdiv(M, length)
    sums = value.new_empty(B, splits, N, D, dtype=torch.float32)
    counts = value.new_empty(B, splits, N, dtype=torch.float32)
    _pool_kernel[(B * splits, *across)](
        assign, value, sums, counts, D, M, N, splits, length, *value.stride(),
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=4, num_stages=4,
    )  # fmt: skip
    return _add_up(sums), _add_up(counts)


def _add_up(sums: Tensor) -> Tensor:
    B, splits, *shape = sums.shape
    if splits == 1 or sums.numel() == 0:
        return sums[:, 0].contiguous()
    update, size = sums.new_empty(B, *shape), sums[0, 0].numel()
    _add_up_kernel[(B * triton.cdiv(size, 256),)](sums, update, size, splits, BLOCK=256)
    return update


def kmeans_gather(grad_update: Tensor, assign: Tensor) -> Tensor:
    (B, N, D), M = grad_update.shape, assign.shape[1]
    out = grad_update.new_empty(B, D, M)
    if out.numel():
        _gather_kernel[(B * triton.cdiv(M, 64), triton.cdiv(D, 64))](
            grad_update.contiguous(), assign.contiguous(), out, D, M, N, BLOCK_M=64, BLOCK_D=64
        )
    return out
