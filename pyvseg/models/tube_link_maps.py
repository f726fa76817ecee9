# SPDX-License-Identifier: Apache-2.0
"""Tube-Link (Li et al., ICCV 2023) where every pixel gets a class: a video goes through tube by tube, results come in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pyvseg.layers.graphs import graphed
from pyvseg.layers.pixel_decoder import PixelFeatures
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.tube_link import TubeLink, TubeLinkSettings
from pyvseg.models.tube_link_tracker import TubeTracks
from pyvseg.models.video_kmax import PanopticFrame


@dataclass(frozen=True)
class TubeMapSettings(TubeLinkSettings):
    """The network's classes are the things, in their order, then the other categories as they rise.

    clip_length   frames of a tube
    """

    classes: int = 124
    things: tuple[int, ...] = ()
    short_side: int | None = None
    clip_length: int = 4

    @property
    def categories(self) -> tuple[int, ...]:
        """The category of each of the network's classes."""
        return (*self.things, *(c for c in range(self.classes) if c not in self.things))


@dataclass
class TubeMapsState:
    """What a video's later frames depend on; of bounded size.

    written    frames whose result is out
    waiting    features of the frames after them
    queries    (Q, C) of the last tube, linked; where only classes are wanted, None
    """

    size: FrameSize
    written: int = 0
    waiting: list[PixelFeatures] = field(default_factory=list)
    queries: Tensor | None = None
    tracks: TubeTracks = field(default_factory=TubeTracks)


class TubeMaps(TubeLink):
    divisor = 10_000  # between a category and an object's id in results

    def new_state(self, height: int, width: int) -> TubeMapsState:
        """For a video of that size."""
        return TubeMapsState(FrameSize.of(height, width, self.settings.short_side, self.settings.long_side))

    def encode_frames(self, images: Sequence[np.ndarray], state: TubeMapsState) -> list[PixelFeatures]:
        """T images, uint8 RGB (H, W, 3) -> the frames, for `step`. As published, the network sees BGR with the statistics of RGB."""
        x = state.size.input(images, self.settings.mean[::-1], self.settings.std[::-1], self.device)
        return self.split(graphed(self.encode, x.flip(1)))

    def step(self, frames: list[PixelFeatures], state: TubeMapsState, *, last: bool = False) -> list[PanopticFrame]:
        """Takes the video's next frames, encoded; returns the results that they complete, in order. `last`: no more will come."""
        state.waiting += frames
        length, results = self.settings.clip_length, []
        while len(state.waiting) >= length or (last and state.waiting):
            tube, state.waiting = state.waiting[:length], state.waiting[length:]
            full = tube + tube[-1:] * (length - len(tube))  # behind the end of the video its last frame stands still
            results += self._results(*self.maps(full, state), len(tube), state)
            state.written += len(tube)
        return results

    def maps(self, frames: list[PixelFeatures], state: TubeMapsState) -> tuple[Tensor, Tensor, list[int]]:
        """Of the next tube: labels (T, H, W), 0 void, else 1 + the number of the segment; the segments' classes (S,), and their
        objects: 0 for none, so that such segments of a class are one."""
        raise NotImplementedError

    def _results(self, labels: Tensor, classes: Tensor, objects: list[int], count: int, state: TubeMapsState) -> list[PanopticFrame]:
        categories = [self.settings.categories[c] for c in classes.tolist()]
        values = np.array([0, *(self.divisor * c + i + 1 for c, i in zip(categories, objects))], np.int32)
        found = zip(range(state.written, state.written + count), labels[:count].cpu().numpy())
        return [PanopticFrame(index, values[frame], self._segments(frame, values, categories)) for index, frame in found]

    def _segments(self, labels: np.ndarray, values: np.ndarray, categories: list[int]) -> list[tuple[int, int, bool]]:
        present = np.flatnonzero(np.bincount(labels.ravel(), minlength=len(values)))
        found = {int(values[s]): categories[s - 1] for s in present if s}
        return [(value, found[value], found[value] in self.settings.things) for value in sorted(found)]
