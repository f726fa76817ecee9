# SPDX-License-Identifier: Apache-2.0
"""Bidirectional softmax scores of embeddings against a memory of tracks (see pyvseg/ops/memory_match.py)."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 32


@triton.jit
def _products(embeddings, memory, scores, N, M, C, TILE: tl.constexpr, CHANNELS: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        e = tl.load(embeddings + (batch * N + row[:, None]) * C + c[None, :], mask=(row[:, None] < N) & (c[None, :] < C), other=0)
        m = tl.load(memory + (batch * M + column[:, None]) * C + c[None, :], mask=(column[:, None] < M) & (c[None, :] < C), other=0)
        total = tl.dot(e.to(tl.float32), tl.trans(m.to(tl.float32)), total, input_precision="ieee")
    out = scores + (batch * N + row[:, None]) * M + column[None, :]
    tl.store(out, total, mask=(row[:, None] < N) & (column[None, :] < M))


@triton.jit
def _both_softmax(scores, labels, memory_labels, out, N, M, LABELS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    scores += batch * N * M
    low = float("-inf")

    row_max = tl.full((TILE,), low, tl.float32)
    row_sum = tl.zeros((TILE,), tl.float32)
    for first in range(0, M, STEP):
        along = first + tl.arange(0, STEP)
        s = tl.load(scores + row[:, None] * M + along[None, :], mask=(row[:, None] < N) & (along[None, :] < M), other=low)
        row_max = tl.maximum(row_max, tl.max(s, 1))
    for first in range(0, M, STEP):
        along = first + tl.arange(0, STEP)
        s = tl.load(scores + row[:, None] * M + along[None, :], mask=(row[:, None] < N) & (along[None, :] < M), other=low)
        row_sum += tl.sum(tl.where(along[None, :] < M, tl.exp(s - row_max[:, None]), 0.0), 1)

    column_max = tl.full((TILE,), low, tl.float32)
    column_sum = tl.zeros((TILE,), tl.float32)
    for first in range(0, N, STEP):
        along = first + tl.arange(0, STEP)
        s = tl.load(scores + along[:, None].to(tl.int64) * M + column[None, :], mask=(along[:, None] < N) & (column[None, :] < M), other=low)
        column_max = tl.maximum(column_max, tl.max(s, 0))
    for first in range(0, N, STEP):
        along = first + tl.arange(0, STEP)
        s = tl.load(scores + along[:, None].to(tl.int64) * M + column[None, :], mask=(along[:, None] < N) & (column[None, :] < M), other=low)
        column_sum += tl.sum(tl.where(along[:, None] < N, tl.exp(s - column_max[None, :]), 0.0), 0)

    there = (row[:, None] < N) & (column[None, :] < M)
    s = tl.load(scores + row[:, None] * M + column[None, :], mask=there, other=0.0)
    by_row = tl.exp(s - row_max[:, None]) / row_sum[:, None]
    by_column = tl.exp(s - column_max[None, :]) / column_sum[None, :]
    result = (by_row + by_column) * 0.5
    if LABELS:
        own = tl.load(labels + batch * N + row, mask=row < N, other=0)
        theirs = tl.load(memory_labels + batch * M + column, mask=column < M, other=0)
        result *= tl.where(own[:, None] == theirs[None, :], 1.0, 0.0)
    tl.store(out + batch * N * M + row[:, None] * M + column[None, :], result, mask=there)


def memory_match(embeddings: Tensor, memory: Tensor, labels: Tensor | None, memory_labels: Tensor | None) -> Tensor:
    *batch, N, C = embeddings.shape
    M = memory.shape[-2]
    scores = embeddings.new_empty(*batch, N, M, dtype=torch.float32)
    out = torch.empty_like(scores)
    if out.numel():
        labels, memory_labels = (None if x is None else x.contiguous() for x in (labels, memory_labels))
        grid = (triton.cdiv(N, _TILE), triton.cdiv(M, _TILE), math.prod(batch))
        _products[grid](embeddings.contiguous(), memory.contiguous(), scores, N, M, C, TILE=_TILE, CHANNELS=64, num_warps=4)
        _both_softmax[grid](scores, labels, memory_labels, out, N, M, LABELS=labels is not None, TILE=_TILE, STEP=64, num_warps=4)
    return out
