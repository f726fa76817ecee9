# SPDX-License-Identifier: Apache-2.0
"""Panoptic models of single images on videos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyvseg.models.frame_size import FrameSize
from pyvseg.models.image_results import Segment
from pyvseg.models.video_kmax import PanopticFrame


@dataclass
class FramesState:
    """written   frames whose result is out"""

    size: FrameSize
    written: int = 0


class FrameByFrame:
    """Gives a model with `panoptic(image)` what a video model has: every frame stands alone, ids begin anew in each."""

    divisor = 10_000

    def new_state(self, height: int, width: int) -> FramesState:
        """For a video of that size."""
        return FramesState(FrameSize((height, width), (height, width), (height, width)))

    def encode_frames(self, images: Sequence[np.ndarray] | np.ndarray, state: FramesState) -> list[tuple[np.ndarray, list[Segment]]]:
        """T images, uint8 RGB (H, W, 3) -> the frames, for `step`."""
        return [self.panoptic(image) for image in images]

    def step(self, frames: list[tuple[np.ndarray, list[Segment]]], state: FramesState, *, last: bool = False) -> list[PanopticFrame]:
        results = []
        for labels, segments in frames:
            values, count, found = np.zeros(1 + max((s.id for s in segments), default=0), np.int32), Counter(), []
            for segment in segments:
                count[segment.category] += 1
                values[segment.id] = segment.category * self.divisor + count[segment.category]
                found.append((int(values[segment.id]), segment.category, segment.is_thing))
            results.append(PanopticFrame(state.written, values[labels], sorted(found)))
            state.written += 1
        return results
