# SPDX-License-Identifier: Apache-2.0
"""Space-time memory read and its gradients; same steps as csrc/cuda/memory_read.cu.

The sweep keeps the best similarity of every eight memory positions; the k best positions of a query lie in its k best such
groups, which are scored again one by one. An N x M matrix never exists: queries go in chunks through a bounded buffer.
"""

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

_BUFFER_WORDS = 1 << 23  # of a chunk of queries: stays in a large GPU's second-level cache
_WIDEN = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter would multiply the bits of bfloat16 numbers
_GROUP = tl.constexpr(8)  # neighbouring memory positions
_LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)


def memory_read(memory_key: Tensor, memory_value: Tensor, query_key: Tensor, top_k: int, dot: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    B, O, N, CV = memory_value.shape
    M, CK = query_key.shape[1:]
    key, value, query = (_rows(t) for t in (memory_key, memory_value, query_key))
    index = value.new_empty(B, M, top_k, dtype=torch.int32)
    weight = value.new_empty(B, M, top_k, dtype=torch.float32)
    scale = 1.0 if dot else 2 / math.sqrt(CK)
    all_groups, size = triton.cdiv(N, _GROUP.value), _GROUP.value
    groups = min(top_k, all_groups)
    chunk = max(1, min(_BUFFER_WORDS // (all_groups + (1 + size) * groups + top_k), M, 65535 * 64))
    for b in range(B):
        for first in range(0, M, chunk):
            rows = min(chunk, M - first)
            queries = query[b, first : first + rows]
            buffer = [index.new_empty(rows, width) for width in (all_groups, groups, groups * size, top_k)]
            maxima, group, score, position = buffer
            grid = (triton.cdiv(N, 64), triton.cdiv(rows, 64))
            keys = (key[b], queries, key.stride(1), query.stride(1), N)
            _sweep[grid](*keys, rows, CK, all_groups, maxima, dot, _WIDEN, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)
            _select_rows(maxima, group)
            _rescore[(rows,)](*keys, CK, group, groups, score, dot, BLOCK=32, BLOCK_K=min(128, triton.next_power_of_2(CK)))
            _select_rows(score, position)
            out = (index[b, first:], weight[b, first:])
            _weigh[(rows,)](position, score, group, groups, top_k, scale, *out, BLOCK=min(1024, triton.next_power_of_2(top_k)))
    return _gather(index, weight, value, value.new_empty(B, O, M, CV)), index, weight


def memory_read_backward(
    grad: Tensor, memory_key: Tensor, memory_value: Tensor, query_key: Tensor, index: Tensor, weight: Tensor, dot: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Deterministic: readers of a memory position are summed in order of query, by a stable sort."""
    B, O, N, CV = memory_value.shape
    M, CK = query_key.shape[1:]
    k = index.shape[-1]
    grad, index, weight = grad.contiguous(), index.contiguous(), weight.contiguous()
    key, value, query = (_rows(t) for t in (memory_key, memory_value, query_key))
    weight_grad = torch.empty_like(weight)
    strides = (value.stride(0), value.stride(1), value.stride(2))
    _weight_gradient[(B * M,)](grad, value, *strides, index, weight_grad, O, M, N, CV, k, BLOCK=16, BLOCK_C=min(128, triton.next_power_of_2(CV)))
    score_grad = weight * (weight_grad - (weight * weight_grad).sum(-1, keepdim=True)) * (1.0 if dot else 2 / math.sqrt(CK))

    order, entry = index.view(B, M * k).sort(stable=True)
    start = torch.searchsorted(order, torch.arange(N + 1, dtype=torch.int32, device=order.device).repeat(B, 1))
    readers = (start, entry)
    grad_value = _scatter(readers, weight, grad, None, value.new_empty(B, O, N, CV))
    grad_key = _scatter(readers, score_grad, query.unsqueeze(1), None if dot else key, key.new_empty(B, 1, N, CK))
    grad_query = _gather(index, score_grad, key.unsqueeze(1), query.new_empty(B, 1, M, CK))
    return grad_key[:, 0], grad_value, grad_query[:, 0]


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _select_rows(keys: Tensor, out: Tensor) -> None:
    """Positions of the out.shape[1] largest of each row, ascending."""
    n = keys.shape[1]
    _select[(keys.shape[0],)](keys, out, n, out.shape[1], BLOCK=min(1024, max(16, triton.next_power_of_2(n))))


def _gather(index: Tensor, weight: Tensor, source: Tensor, out: Tensor) -> Tensor:
    """out (B, O, M, C) = sum over rank of weight * source[index], source (B, O, N, C)."""
    B, O, M, C = out.shape
    block = min(512, triton.next_power_of_2(C))
    strides = source.stride()[:3]
    grid = (B * O * M, triton.cdiv(C, block))
    _gather_rows[grid](index, weight, source, *strides, out, O, M, source.shape[2], C, index.shape[-1], BLOCK=8, BLOCK_C=block)
    return out


def _scatter(readers: tuple[Tensor, Tensor], weight: Tensor, source: Tensor, own: Tensor | None, out: Tensor) -> Tensor:
    """out (B, O, N, C) = sum over each position's readers of weight * source[query], less the weights' sum times own[position]."""
    B, O, N, C = out.shape
    M, k = weight.shape[1:]
    block = min(512, triton.next_power_of_2(C))
    own_strides = (0, 0) if own is None else own.stride()[:2]
    grid = (B * O * N, triton.cdiv(C, block))
    _scatter_rows[grid](*readers, weight, source, *source.stride()[:3], own, *own_strides, out, O, N, M, C, k, BLOCK=8, BLOCK_C=block)
    return out


@triton.jit
def _ordered(x):
    """float32 with its order as int32: any NaN highest, -0 equal to 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, _HIGHEST, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def _unordered(i):
    return tl.where(i < 0, i ^ 0x7FFFFFFF, i).to(tl.float32, bitcast=True)


@triton.jit
def _sweep(memory, query, memory_row, query_row, N, M, CK, groups, maxima, dot: tl.constexpr, WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """maxima (M, groups): the best score of every group of memory positions, as ordered integers."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    norm = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, CK, BLOCK_K):
        c = first + tl.arange(0, BLOCK_K)
        mk = tl.load(memory + n[:, None] * memory_row + c, mask=(n[:, None] < N) & (c < CK), other=0.0)
        qk = tl.load(query + m[:, None] * query_row + c, mask=(m[:, None] < M) & (c < CK), other=0.0)
        if WIDEN:
            mk, qk = mk.to(tl.float32), qk.to(tl.float32)
        products = tl.dot(qk, tl.trans(mk), products, input_precision="ieee")
        if not dot:
            wide = mk.to(tl.float32)
            norm += tl.sum(wide * wide, 1)
    keys = tl.where(n < N, _ordered(products - 0.5 * norm), _LOWEST)
    best = tl.max(tl.reshape(keys, (BLOCK_M, BLOCK_N // _GROUP, _GROUP)), 2)
    group = tl.program_id(0).to(tl.int64) * (BLOCK_N // _GROUP) + tl.arange(0, BLOCK_N // _GROUP)
    tl.store(maxima + m[:, None] * groups + group, best, mask=(m[:, None] < M) & (group < groups))


@triton.jit
def _select(keys, out, n, k, BLOCK: tl.constexpr):
    """Positions of the k largest of a row of keys, ascending; among equals the earlier ones.

    The k-th largest is found in four digits of 8 bits, each in a histogram of the keys that share the digits before it.
    """
    keys += tl.program_id(0).to(tl.int64) * n
    out += tl.program_id(0).to(tl.int64) * k
    at = tl.arange(0, BLOCK)
    bins = tl.arange(0, 256)
    bound = tl.full((), 0, tl.int32)  # as an unsigned number
    equals = k  # how many keys that equal the bound so far are among the k largest
    for place in tl.static_range(4):
        counts = tl.zeros((256,), tl.int32)
        for first in range(0, n, BLOCK):
            i = first + at
            key = tl.load(keys + i, mask=i < n, other=_LOWEST) ^ _LOWEST
            shared = (i < n) & ((key & (0 if place == 0 else -(1 << (32 - 8 * place)))) == bound)
            counts += tl.histogram((key >> (24 - 8 * place)) & 255, 256, mask=shared)
        digit = tl.sum((tl.cumsum(counts, 0, reverse=True) >= equals).to(tl.int32)) - 1
        equals -= tl.sum(tl.where(bins > digit, counts, 0))
        bound |= digit << (24 - 8 * place)
    bound ^= _LOWEST

    kept, equals_kept = 0, 0
    for first in range(0, n, BLOCK):
        i = first + at
        key = tl.load(keys + i, mask=i < n, other=_LOWEST)
        equal = ((key == bound) & (i < n)).to(tl.int32)
        equal_rank = equals_kept + tl.cumsum(equal, 0)
        keep = (key > bound) | ((equal == 1) & (equal_rank <= equals))
        rank = kept + tl.cumsum(keep.to(tl.int32), 0)
        tl.store(out + rank - 1, i, mask=keep)
        kept = tl.max(rank)
        equals_kept = tl.max(equal_rank)


@triton.jit
def _rescore(memory, query, memory_row, query_row, N, CK, group, groups, score, dot: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """score (M, groups * 8): scores of all positions of a query's best groups in float32, as ordered integers."""
    m = tl.program_id(0).to(tl.int64)
    for first in range(0, groups * _GROUP, BLOCK):
        i = first + tl.arange(0, BLOCK)
        there = i < groups * _GROUP
        n = tl.load(group + m * groups + i // _GROUP, mask=there, other=0).to(tl.int64) * _GROUP + i % _GROUP
        total = tl.zeros((BLOCK,), tl.float32)
        norm = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, CK, BLOCK_K):
            c = start + tl.arange(0, BLOCK_K)
            mask = (there & (n < N))[:, None] & (c < CK)
            mk = tl.load(memory + n[:, None] * memory_row + c, mask=mask, other=0.0).to(tl.float32)
            qk = tl.load(query + m * query_row + c, mask=c < CK, other=0.0).to(tl.float32)
            total += tl.sum(mk * qk, 1)
            if not dot:
                norm += tl.sum(mk * mk, 1)
        keys = tl.where(n < N, _ordered(total - 0.5 * norm), _LOWEST)
        tl.store(score + m * groups * _GROUP + i, keys, mask=there)


@triton.jit
def _weigh(position, score, group, groups, k, scale, index, weight, BLOCK: tl.constexpr):
    """Memory positions and softmax of the k chosen candidates of a query."""
    m = tl.program_id(0).to(tl.int64)
    position += m * k
    score += m * groups * _GROUP
    group += m * groups
    at = tl.arange(0, BLOCK)
    largest = tl.full((), _LOWEST, tl.int32)
    for first in range(0, k, BLOCK):
        i = first + at
        chosen = tl.load(position + i, mask=i < k, other=0)
        largest = tl.maximum(largest, tl.max(tl.load(score + chosen, mask=i < k, other=_LOWEST)))
    top = _unordered(largest)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, k, BLOCK):
        i = first + at
        chosen = tl.load(position + i, mask=i < k, other=0)
        gap = (_unordered(tl.load(score + chosen, mask=i < k, other=0)) - top) * scale
        total += tl.sum(tl.where(i < k, tl.exp(gap), 0.0))
    for first in range(0, k, BLOCK):
        i = first + at
        chosen = tl.load(position + i, mask=i < k, other=0)
        gap = (_unordered(tl.load(score + chosen, mask=i < k, other=0)) - top) * scale
        n = tl.load(group + chosen // _GROUP, mask=i < k, other=0) * _GROUP + chosen % _GROUP
        tl.store(index + m * k + i, n, mask=i < k)
        tl.store(weight + m * k + i, tl.exp(gap) / total, mask=i < k)


@triton.jit
def _gather_rows(index, weight, source, source_b, source_o, source_row, out, O, M, N, C, k, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    b, o, entries = r // M // O, r // M % O, (r // M // O * M + r % M) * k
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    source += b * source_b + o * source_o
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, k, BLOCK):
        j = first + tl.arange(0, BLOCK)
        n = tl.load(index + entries + j, mask=j < k, other=-1).to(tl.int64)
        there = (n >= 0) & (n < N)
        coefficient = tl.load(weight + entries + j, mask=there, other=0.0)
        rows = tl.load(source + n[:, None] * source_row + c, mask=there[:, None] & (c < C), other=0.0).to(tl.float32)
        total += tl.sum(coefficient[:, None] * rows, 0)
    tl.store(out + r * C + c, total.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def _scatter_rows(start, entry, weight, source, source_b, source_o, source_row, own, own_b, own_row, out, O, N, M, C, k, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    b, o, n = r // N // O, r // N % O, r % N
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    source += b * source_b + o * source_o
    begin, end = tl.load(start + b * (N + 1) + n), tl.load(start + b * (N + 1) + n + 1)
    total = tl.zeros((BLOCK_C,), tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    for first in range(begin, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        e = tl.load(entry + b * M * k + i, mask=i < end, other=0)
        coefficient = tl.load(weight + b * M * k + e, mask=i < end, other=0.0)
        rows = tl.load(source + (e // k)[:, None] * source_row + c, mask=(i < end)[:, None] & (c < C), other=0.0).to(tl.float32)
        total += tl.sum(coefficient[:, None] * rows, 0)
        if own is not None:
            mass += tl.sum(coefficient)
    if own is not None:
        if begin < end:
            total -= mass * tl.load(own + b * own_b + n * own_row + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out + r * C + c, total.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def _weight_gradient(grad, value, value_b, value_o, value_row, index, out, O, M, N, C, k, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """out (B, M, k): the readout's gradient times the value row of each entry, summed over objects and channels."""
    b, m = tl.program_id(0).to(tl.int64) // M, tl.program_id(0).to(tl.int64) % M
    entries = (b * M + m) * k
    for first in range(0, k, BLOCK):
        j = first + tl.arange(0, BLOCK)
        n = tl.load(index + entries + j, mask=j < k, other=-1).to(tl.int64)
        there = (n >= 0) & (n < N)
        total = tl.zeros((BLOCK,), tl.float32)
        for o in range(0, O):
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                wanted = tl.load(grad + ((b * O + o) * M + m) * C + c, mask=c < C, other=0.0).to(tl.float32)
                at = value + b * value_b + o * value_o + n[:, None] * value_row + c
                total += tl.sum(tl.load(at, mask=there[:, None] & (c < C), other=0.0).to(tl.float32) * wanted, 1)
        tl.store(out + entries + j, total, mask=j < k)
