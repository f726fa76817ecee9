# SPDX-License-Identifier: Apache-2.0
"""The leading queries of every full-size pixel (see pyvseg/ops/mask_winners.py): all queries pass by a tile of pixels, whose
logits, best ones and sum of exponentials stay in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _lead(logits, row_first, row_weights, column_first, column_weights, index, probability, N, height, width, H, W,
          BEST: tl.constexpr, ROW_TAPS: tl.constexpr, COLUMN_TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    t = tl.program_id(2).to(tl.int64)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    top, left = tl.load(row_first + y, mask=y < H, other=0), tl.load(column_first + x, mask=x < W, other=0)
    planes = logits + t * N * height * width
    best = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    second = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    winner = tl.zeros((ROWS, COLUMNS), tl.int32)
    runner_up = tl.zeros((ROWS, COLUMNS), tl.int32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)  # of exponentials, over that of the best
    for n in range(0, N):
        logit = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.static_range(ROW_TAPS):
            row = tl.minimum(top + i, height - 1) * width
            along = tl.zeros((ROWS, COLUMNS), tl.float32)
            for j in tl.static_range(COLUMN_TAPS):
                share = tl.load(column_weights + x * COLUMN_TAPS + j, mask=x < W, other=0.0)
                along += share * tl.load(planes + row + tl.minimum(left + j, width - 1))
            logit += tl.load(row_weights + y * ROW_TAPS + i, mask=y < H, other=0.0) * along
        planes += height * width
        leads = logit > best
        if BEST == 2:
            follows = logit > second
            runner_up = tl.where(leads, winner, tl.where(follows, n, runner_up))
            second = tl.where(leads, best, tl.where(follows, logit, second))
        between = tl.exp(-tl.abs(logit - best))
        total = tl.where(leads, total * between + 1.0, total + between)
        winner = tl.where(leads, n, winner)
        best = tl.where(leads, logit, best)
    inside = (y < H) & (x < W)
    at = (t * H + y) * W + x
    tl.store(index + at, winner.to(tl.int16), mask=inside)
    tl.store(probability + at, 1.0 / total, mask=inside)
    if BEST == 2:
        at += tl.num_programs(2).to(tl.int64) * H * W
        tl.store(index + at, runner_up.to(tl.int16), mask=inside)
        tl.store(probability + at, tl.exp(second - best) / total, mask=inside)


def mask_winners(
    logits: Tensor, row_first: Tensor, row_weights: Tensor, column_first: Tensor, column_weights: Tensor, best: int
) -> tuple[Tensor, Tensor]:
    T, N, height, width = logits.shape
    H, W = len(row_first), len(column_first)
    index = logits.new_empty(best, T, H, W, dtype=torch.int16)
    probability = logits.new_empty(best, T, H, W)
    if index.numel():
        _lead[(triton.cdiv(W, 32), triton.cdiv(H, 8), T)](
            logits.contiguous(), row_first, row_weights, column_first, column_weights, index, probability, N, height, width, H, W,
            BEST=best, ROW_TAPS=row_weights.shape[1], COLUMN_TAPS=column_weights.shape[1], ROWS=8, COLUMNS=32, num_warps=4,
        )  # fmt: skip
    return index, probability
