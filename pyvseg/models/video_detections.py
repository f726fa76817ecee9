# SPDX-License-Identifier: Apache-2.0
"""The objects of a video, frame by frame."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pyvseg.models.spool import Spool
from pyvseg.models.video_detector import FrameDetections


@dataclass(frozen=True)
class FrameObjects:
    """N objects in frame `index`, best first.

    boxes       float32 (N, 4): x1, y1, x2, y2 in pixels, which may lie outside the frame
    scores      float32 (N,)
    labels      int64 (N,), classes from 0
    categories  names of the classes, where they are known
    """

    index: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)


class VideoDetections:
    """A sequence of `FrameObjects`, one for each frame of a video; kept in a temporary file when they are many."""

    def __init__(self, frames: int, classes: tuple[str, ...] = ()) -> None:
        self.classes = classes
        self._numbers = array("q", [-1] * frames)
        self._spool = Spool()

    def put(self, frame: int, found: FrameDetections, top: int | None = None) -> None:
        """What a network found, the `top` best of it. Its class 0 is none, and is left out: class i here is its class i + 1."""
        there = found.labels > 0
        rows = torch.cat([found.boxes, found.scores[:, None], found.labels[:, None] - 1], 1)[there]
        self._numbers[frame] = self._spool.append(rows[:top].float())

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, frame: int) -> FrameObjects:
        """Raises IndexError beyond the last frame."""
        rows = self._spool[self._numbers[frame]].numpy()
        labels = rows[:, 5].astype(np.int64)
        names = tuple(self.classes[i] if i < len(self.classes) else "" for i in labels.tolist())
        return FrameObjects(frame % len(self), rows[:, :4], rows[:, 4], labels, names)

    def __iter__(self) -> Iterator[FrameObjects]:
        return (self[t] for t in range(len(self)))
