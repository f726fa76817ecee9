# SPDX-License-Identifier: Apache-2.0
"""Masks as bits and their overlaps (see pyvseg/ops/mask_iou.py)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 16  # that a program packs
_SLICE = 1 << 16  # words that one program counts at most: far from the limits of int32


@triton.jit
def _pack(masks, bits, numel, words, WORDS: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 64)
    at = word[:, None] * 64 + bit[None, :]
    on = tl.load(masks + row * numel + at, mask=at < numel, other=0).to(tl.float32) > 0
    packed = tl.sum(on.to(tl.int64) << bit[None, :].to(tl.int64), 1)
    tl.store(bits + row * words + word, packed, mask=word < words)


def pack_masks(masks: Tensor) -> Tensor:
    rows = masks.contiguous()
    N, numel = rows.shape
    bits = rows.new_empty(N, triton.cdiv(numel, 64), dtype=torch.int64)
    if bits.numel():
        rows = rows.view(torch.uint8) if rows.dtype == torch.bool else rows
        _pack[(triton.cdiv(bits.shape[1], _WORDS), N)](rows, bits, numel, bits.shape[1], WORDS=_WORDS, num_warps=4)
    return bits


@triton.jit
def _bits(base, row, rows, words, word, end, WORDS: tl.constexpr):
    """The elements of WORDS words from `word` on, of the masks `row`, as int8 zeros and ones; zeros outside."""
    at = word + tl.arange(0, WORDS)
    value = tl.load(base + row[:, None] * words + at[None, :], mask=(row[:, None] < rows) & (at[None, :] < end), other=0)
    bit = (value[:, :, None] >> tl.arange(0, 64).to(tl.int64)[None, None, :]) & 1
    return tl.reshape(bit.to(tl.int8), (row.shape[0], WORDS * 64))


@triton.jit
def _overlap(a, b, counts, N, M, words, slice, TILE: tl.constexpr, WORDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    begin = tl.program_id(2).to(tl.int64) * slice
    end = tl.minimum(begin + slice, words)
    total = tl.zeros((TILE, TILE), tl.int32)
    for word in range(begin, end, WORDS):
        left = _bits(a, row, N, words, word, end, WORDS)
        right = _bits(b, column, M, words, word, end, WORDS)
        total = tl.dot(left, tl.trans(right), total, out_dtype=tl.int32)
    out = counts + tl.program_id(2).to(tl.int64) * N * M + row[:, None] * M + column[None, :]
    tl.store(out, total, mask=(row[:, None] < N) & (column[None, :] < M))


@triton.jit
def _areas(bits, area, words, WORDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    bit = tl.arange(0, 64).to(tl.int64)
    total = tl.zeros((WORDS,), tl.int64)
    for begin in range(0, words, WORDS):
        at = begin + tl.arange(0, WORDS)
        value = tl.load(bits + row * words + at, mask=at < words, other=0)
        total += tl.sum((value[:, None] >> bit[None, :]) & 1, 1)
    tl.store(area + row, tl.sum(total, 0))


def mask_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = a.contiguous(), b.contiguous()
    (N, words), M = a.shape, b.shape[0]
    areas = [bits.new_zeros(bits.shape[0]) for bits in (a, b)]
    if words:
        for bits, area in zip((a, b), areas, strict=True):
            if area.numel():
                _areas[(area.numel(),)](bits, area, words, WORDS=32, num_warps=4)
    if not (N and M and words):
        return a.new_zeros(N, M), *areas
    tile = 64 if max(N, M) > 32 else 32
    tiles = triton.cdiv(N, tile) * triton.cdiv(M, tile)
    slices = max(1, min(512 // tiles, triton.cdiv(words, 64)), triton.cdiv(words, _SLICE))
    slice = triton.cdiv(words, slices)
    slices = triton.cdiv(words, slice)
    counts = a.new_empty(slices, N, M, dtype=torch.int32)
    _overlap[(triton.cdiv(N, tile), triton.cdiv(M, tile), slices)](
        a, b, counts, N, M, words, slice, TILE=tile, WORDS=2, num_warps=4
    )  # fmt: skip
    return counts.sum(0), *areas
