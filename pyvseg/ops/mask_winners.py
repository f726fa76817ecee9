# SPDX-License-Identifier: Apache-2.0
"""Full-size decisions from coarse mask logits: which queries lead at each pixel, and how sure they are.

Panoptic results (kMaX-DeepLab, Video-kMaX) need no more than that of the full-size logits of all queries.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyvseg.ops import _dispatch

__all__ = ["MaskWinners", "Resampling", "mask_bands", "mask_winners"]

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
    def bilinear(cls, before: int, after: int, align_corners: bool) -> "Resampling":
        """What `torch.nn.functional.interpolate` does along an axis, with positions in float32 as there."""
        i, half = np.arange(after, dtype=np.float32), np.float32(0.5)
        if align_corners:
            position = i * (np.float32(before - 1) / np.float32(max(after - 1, 1)))
        else:
            position = np.maximum((i + half) * (np.float32(before) / np.float32(after)) - half, 0)
        first = np.minimum(position.astype(np.int64), before - 1)
        second = np.where(first < before - 1, position - first.astype(np.float32), np.float32(0))
        return cls(before, first, np.stack([1 - second, second], 1).astype(np.float32))

    def cut(self, outputs: int) -> "Resampling":
        """The first `outputs` only."""
        return Resampling(self.inputs, self.first[:outputs], self.weights[:outputs])

    def then(self, after: "Resampling") -> "Resampling":
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

    def taps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`first`, int32, and `weights` there; made once."""
        made = self.__dict__.setdefault("_taps", {})
        if device not in made:
            made[device] = torch.from_numpy(self.first.astype(np.int32)).to(device), torch.from_numpy(self.weights).to(device)
        return made[device]

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


class MaskWinners(NamedTuple):
    index: Tensor  # (best, T, H, W) int16
    probability: Tensor  # (best, T, H, W) float32


def mask_winners(
    logits: Tensor,  # (T, N, h, w) float32
    rows: Resampling,  # of h to H
    columns: Resampling,  # of w to W
    best: int = 1,  # or 2
    *,
    backend: str = "auto",
) -> MaskWinners:
    """The queries with the `best` largest logits at every full-size pixel, largest first, and their softmax over all queries.

    The full-size logits (T, N, H, W) are never stored. Among equal ones the first query wins. The softmax leaves out queries
    that are at least 25 below another in a whole tile: less than 1e-10 each. Logits must be finite; NaN gives no
    meaningful winner. No gradient.

    Raises ValueError for shapes, TypeError for dtypes, naming the argument.
    """
    _check(logits, rows, columns, best)
    choice = _dispatch.choose("mask_winners", backend, logits, dtypes=(torch.float32,), slower="10 times")
    if choice == "reference":
        return MaskWinners(*reference(logits.detach(), rows, columns, best))
    return MaskWinners(*_dispatch.kernels(choice).mask_winners(logits.detach(), *rows.taps(logits.device), *columns.taps(logits.device), best))


def mask_bands(logits: Tensor, rows: Resampling, columns: Resampling) -> Iterator[tuple[slice, Tensor]]:
    """Full-size logits (N, R, W) of (N, h, w), some rows R at a time."""
    height, width = len(rows.first), len(columns.first)
    step = max(1, BAND_BYTES // max(1, 4 * len(logits) * width))
    for start in range(0, height, step):
        part = slice(start, min(start + step, height))
        yield part, columns.apply(rows.apply(logits, 1, part), 2)


def reference(logits: Tensor, rows: Resampling, columns: Resampling, best: int) -> tuple[Tensor, Tensor]:
    """The definition in PyTorch, some rows at a time."""
    shape = best, len(logits), len(rows.first), len(columns.first)
    index = torch.empty(shape, dtype=torch.int16, device=logits.device)
    probability = torch.empty(shape, dtype=logits.dtype, device=logits.device)
    for t, frame in enumerate(logits):
        for part, band in mask_bands(frame, rows, columns):
            total = band.logsumexp(0)
            for k in range(best):
                largest, winner = band.max(0)
                index[k, t, part], probability[k, t, part] = winner.short(), (largest - total).exp_()
                band.scatter_(0, winner[None], -torch.inf)
    return index, probability


def _check(logits: Tensor, rows: Resampling, columns: Resampling, best: int) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a floating-point tensor, got {getattr(logits, 'dtype', type(logits).__name__)}")
    if logits.ndim != 4 or not 0 < logits.shape[1] < 1 << 15:
        raise ValueError(f"logits must be (T, N, h, w) with 1 to 32767 queries, got shape {tuple(logits.shape)}")
    for name, axis, size in (("rows", rows, logits.shape[2]), ("columns", columns, logits.shape[3])):
        if not isinstance(axis, Resampling):
            raise TypeError(f"{name} must be a Resampling, got {type(axis).__name__}")
        if axis.inputs != size:
            raise ValueError(f"{name} must resample the logits' {size} positions, got one of {axis.inputs}")
    if best not in (1, 2) or best > logits.shape[1]:
        raise ValueError(f"best must be 1 or 2 and no more than the queries, got {best}")


@_dispatch.register_fake("mask_winners")
def _fake(logits: Tensor, row_first: Tensor, row_weights: Tensor, column_first: Tensor, column_weights: Tensor, best: int) -> tuple[Tensor, Tensor]:
    shape = best, len(logits), len(row_first), len(column_first)
    return logits.new_empty(shape, dtype=torch.int16), logits.new_empty(shape)
