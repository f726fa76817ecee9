# SPDX-License-Identifier: Apache-2.0
"""The space-time memory of semi-supervised segmentation: what past frames looked like and where the objects were in them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyvseg import ops


@dataclass
class MemoryBank:
    """Keys and values of past frames for objects that entered together and therefore share one affinity.

    object_ids   ids in the order of the value axis
    keys         (1, capacity, CK): the first `frames * cells` rows are memory, temporary entries follow
    values       (1, O, capacity, CV)
    frames       frames in memory; each holds `cells` rows
    temporary    temporary frames behind them, dropped by the next append
    origin       per frame: its index in the video, or -1 - index if the frame was annotated by the user
    """

    object_ids: tuple[int, ...]
    cells: int
    keys: Tensor | None = None
    values: Tensor | None = None
    frames: int = 0
    temporary: int = 0
    origin: list[int] = field(default_factory=list)

    def append(self, index: int, key: Tensor, value: Tensor, *, annotated: bool, max_frames: int | None) -> None:
        """Remember frame `index`: key (cells, CK), value (O, cells, CV).

        A full bank overwrites its oldest frame that was not annotated by the user. Annotated frames are never evicted:
        they are the only ones known to be right, everything else is prediction. If all frames are annotated, the bank grows.
        """
        self.temporary = 0
        slot = self.frames
        if max_frames is not None and self.frames >= max_frames:
            predicted = [i for i, origin in enumerate(self.origin) if origin >= 0]
            slot = min(predicted, key=self.origin.__getitem__, default=self.frames)
        if slot == self.frames:
            self.frames += 1
            self.origin.append(0)
        self.origin[slot] = -1 - index if annotated else index
        self._write(slot, key, value)

    def append_temporary(self, key: Tensor, value: Tensor) -> None:
        """Like `append`, but only until the next append or `temporary` is set back."""
        self._write(self.frames + self.temporary, key, value)
        self.temporary += 1

    def read(self, query: Tensor, top_k: int) -> Tensor:
        """Queries (M, CK) -> readout (O, M, CV)."""
        rows = (self.frames + self.temporary) * self.cells
        return ops.memory_read(self.keys[:, :rows], self.values[:, :, :rows], query[None], top_k=top_k)[0]

    def _write(self, slot: int, key: Tensor, value: Tensor) -> None:
        self._reserve((slot + 1) * self.cells, key, value)
        rows = slice(slot * self.cells, (slot + 1) * self.cells)
        self.keys[0, rows] = key
        self.values[0, :, rows] = value

    def _reserve(self, rows: int, key: Tensor, value: Tensor) -> None:
        have = 0 if self.keys is None else self.keys.shape[1]
        if rows <= have:
            return
        capacity = max(rows, have + max(have // 2, 4 * self.cells))
        keys = key.new_empty(1, capacity, key.shape[-1])
        values = value.new_empty(1, value.shape[0], capacity, value.shape[-1])
        if have:
            keys[:, :have], values[:, :, :have] = self.keys, self.values
        self.keys, self.values = keys, values


def aggregate(probabilities: Tensor) -> Tensor:
    """Soft aggregation (STM, Oh et al., 2019): independent object probabilities (K, ...) -> (K + 1, ...), background first, sum 1."""
    p = probabilities.float()
    p = torch.cat([(1 - p).prod(0, keepdim=True), p]).clamp_(1e-7, 1 - 1e-7)
    odds = p / (1 - p)
    return odds / odds.sum(0, keepdim=True)
