# SPDX-License-Identifier: Apache-2.0
"""Full-size decisions from coarse mask logits: which queries lead at each pixel, and how sure they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BAND_BYTES = 16 << 20  # of full-size logits at a time


@dataclass(frozen=True)
class Resampling:
    """A linear map along one axis: output i is the sum over k of weights[i, k] * input[first[i] + k].

    first     (M,) int64; a window may stick out of the input, where its weights are 0
    weights   (M, K) float32
    """

    inputs: int
    first: np.ndarray
    weights: np.ndarray

    @classmethod
    def bilinear(cls, before: int, after: int, align_corners: bool) -> Resampling:
        """What `torch.nn.functional.interpolate` does along an axis, with positions in float32 as there."""
        i, half = np.arange(after, dtype=np.float32), np.float32(0.5)
        if align_corners:
            position = i * (np.float32(before - 1) / np.float32(max(after - 1, 1)))
        else:
            position = np.maximum((i + half) * (np.float32(before) / np.float32(after)) - half, 0)
        first = np.minimum(position.astype(np.int64), before - 1)
        second = np.where(first < before - 1, position - first.astype(np.float32), np.float32(0))
        return cls(before, first, np.stack([1 - second, second], 1).astype(np.float32))

    def cut(self, outputs: int) -> Resampling:
        """The first `outputs` only."""
        return Resampling(self.inputs, self.first[:outputs], self.weights[:outputs])

    def then(self, after: Resampling) -> Resampling:
        """This one followed by `after`."""
        between = np.minimum(after.first[:, None] + np.arange(after.weights.shape[1]), after.inputs - 1)
        sources = self.first[between][..., None] + np.arange(self.weights.shape[1])  # (M, J, K)
        shares = after.weights[..., None] * self.weights[between].astype(np.float64)
        sources, shares = (x.reshape(len(after.first), -1) for x in (sources, shares))
        first = np.where(shares != 0, sources, self.inputs).min(1)
        offsets = np.where(shares != 0, sources - first[:, None], 0)
        weights = np.zeros((len(first), offsets.max(initial=0) + 1))
        np.add.at(weights, (np.arange(len(first))[:, None], offsets), shares)
        return Resampling(self.inputs, first, weights.astype(np.float32))

    def apply(self, x: Tensor, dim: int, outputs: slice = slice(None)) -> Tensor:
        """Of x along `dim`, of which it makes some outputs only."""
        first, weights = self.first[outputs], torch.from_numpy(self.weights[outputs]).to(x.device)
        shape = [1] * x.ndim
        shape[dim] = len(first)
        total = 0
        for k in range(weights.shape[1]):
            index = torch.from_numpy(np.minimum(first + k, self.inputs - 1)).to(x.device)
            total = total + x.index_select(dim, index) * weights[:, k].reshape(shape)
        return total


class Winners(NamedTuple):
    """Of every pixel of T frames the queries with the largest logits, best first, and their softmax over all queries.

    index         (k, T, H, W) uint8 or int16
    probability   (k, T, H, W) float32
    """

    index: Tensor
    probability: Tensor


def bands(logits: Tensor, rows: Resampling, columns: Resampling) -> Iterator[tuple[slice, Tensor]]:
    """Full-size logits (N, R, W) of (N, h, w), some rows R at a time."""
    height, width = len(rows.first), len(columns.first)
    step = max(1, BAND_BYTES // max(1, 4 * len(logits) * width))
    for start in range(0, height, step):
        part = slice(start, min(start + step, height))
        yield part, columns.apply(rows.apply(logits, 1, part), 2)


def mask_winners(logits: Tensor, rows: Resampling, columns: Resampling, count: int = 1) -> Winners:
    """logits (T, N, h, w), N > 0, resampled to (H, W) -> the `count` best queries of every pixel."""
    shape = count, len(logits), len(rows.first), len(columns.first)
    index = torch.empty(shape, dtype=torch.uint8 if logits.shape[1] <= 256 else torch.int16, device=logits.device)
    probability = torch.empty(shape, dtype=torch.float32, device=logits.device)
    for t, frame in enumerate(logits):
        for part, band in bands(frame, rows, columns):
            best, order = band.topk(count, 0) if count > 1 else band.max(0, keepdim=True)
            index[:, t, part] = order.to(index.dtype)
            probability[:, t, part] = (best - band.logsumexp(0)).exp_()
    return Winners(index, probability)
