# SPDX-License-Identifier: Apache-2.0
"""Resizing frames as Pillow does: bilinear, antialiased, whole numbers between its two passes.

The published video instance segmentation systems resize their frames with Pillow; other libraries round differently.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_BITS = 22  # fraction bits of a weight


def resize_bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (T, H, W, 3) -> uint8 (T, *size, 3) on any device, bit for bit what Pillow's `resize(..., BILINEAR)` gives.

    Rows are resized before columns; new releases of Pillow turn that round where one axis shrinks and the other grows.
    """
    for axis, target in ((2, size[1]), (1, size[0])):
        if x.shape[axis] != target:
            x = _resize_axis(x, axis, target)
    return x


def _resize_axis(x: Tensor, axis: int, size: int) -> Tensor:
    index, weight = _taps(x.shape[axis], size, x.device)
    shape = [1] * x.ndim
    shape[axis] = size
    total = 1 << (_BITS - 1)
    for i, w in zip(index, weight):
        total = total + x.index_select(axis, i) * w.view(shape)
    return (total >> _BITS).clamp_(0, 255).to(torch.uint8)


@lru_cache(64)
@torch.inference_mode(False)
def _taps(before: int, after: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every output position the input positions that it sums, int64 (taps, after), and their int32 weights."""
    scale = before / after
    support = max(scale, 1.0)
    centre = (np.arange(after) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(int), 0)
    end = np.minimum((centre + support + 0.5).astype(int), before)
    position = first + np.arange(math.ceil(support) * 2 + 1)[:, None]
    weight = np.clip(1 - np.abs((position - centre + 0.5) / support), 0, None) * (position < end)
    weight = (weight / weight.sum(0) * (1 << _BITS) + 0.5).astype(np.int32)
    return torch.from_numpy(np.minimum(position, before - 1)).to(device), torch.from_numpy(weight).to(device)
