# SPDX-License-Identifier: Apache-2.0
"""Tube-Link (Li et al., ICCV 2023), video instance segmentation: queries are followed from tube to tube."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from pyvseg.layers.pixel_decoder import PixelFeatures
from pyvseg.models.frame_size import FloatFrameSize, FrameSize
from pyvseg.models.minvis import match
from pyvseg.models.spool import MaskStore
from pyvseg.models.tube_link import Tube, TubeLink, TubeLinkSettings
from pyvseg.models.tube_link_ranking import ranked_by_frames
from pyvseg.models.video_instances import Selection, VideoInstances


@dataclass(frozen=True)
class TubeLinkInstancesSettings(TubeLinkSettings):
    """Published constants.

    tube    frames segmented together, a few less where a chunk does not come out even
    chunk   frames after which the tubes are counted anew
    top     (object, class) pairs that may become tracks
    shown   of these, in every frame
    """

    short_side: int | None = 480
    long_side: int = 854
    tube: int = 4
    chunk: int = 36
    top: int = 100
    shown: int = 30

    @property
    def held_frames(self) -> int:
        """Frames whose features are in memory at a time, at most: until it is sure which tube they belong to."""
        return min(self.chunk, (self.tube - 1) ** 2 + 1)


@dataclass
class TubeLinkInstancesState:
    """What a video's later frames and its result depend on; slot s continues query s of the first tube.

    waiting   features of the frames after the last tube
    begun     frames of the chunk that have gone into tubes
    frames    that have gone into tubes, and the number of those
    tubes
    queries   (Q, C) of the last tube, in the order of the slots
    logits    (Q, K + 1) sum over the tubes
    masks     of every slot in every frame
    """

    size: FrameSize
    waiting: list[PixelFeatures] = field(default_factory=list)
    begun: int = 0
    frames: int = 0
    tubes: int = 0
    queries: Tensor | None = None
    logits: Tensor | None = None
    masks: MaskStore = field(default_factory=MaskStore)


class TubeLinkInstances(TubeLink):
    """The published code starts anew every 36 frames and takes objects of equal rank for one; here they are followed on."""

    def new_state(self, size: FrameSize) -> TubeLinkInstancesState:
        return TubeLinkInstancesState(FloatFrameSize(size.source, size.resized, size.padded))

    def segment_clip(self, features: PixelFeatures, state: TubeLinkInstancesState) -> list[PixelFeatures]:
        return self.split(features)

    def link(self, clip: list[PixelFeatures], state: TubeLinkInstancesState) -> list[Tensor]:
        """Takes frames; segments the tubes whose ends they tell and puts their queries in the order of the slots. Returns the orders."""
        s, orders = self.settings, []
        for frame in clip:
            state.waiting.append(frame)
            ends = sure_ends(state.begun + len(state.waiting), s.tube, s.chunk)
            orders += self._tubes([end for end in ends if end > state.begun], state)
            state.begun %= s.chunk
        return orders

    def finish(self, state: TubeLinkInstancesState, top: int | None = None, compat: bool = True) -> VideoInstances:
        """The tracks of the video, at most `top` of them. Nothing can follow."""
        self.flush(state)
        pairs = Selection.best((state.logits / state.tubes).softmax(-1)[:, :-1], self.settings.top, compat=compat)
        return ranked_by_frames(pairs, state.masks, state.size, self.settings.shown, top, self.device)

    def flush(self, state: TubeLinkInstancesState) -> list[Tensor]:
        """The video has ended: its last tubes."""
        ends = tube_ends(state.begun + len(state.waiting), self.settings.tube)
        return self._tubes([end for end in ends if end > state.begun], state)

    def _tubes(self, ends: list[int], state: TubeLinkInstancesState) -> list[Tensor]:
        orders = []
        for end in ends:
            length = end - state.begun
            frames, state.waiting = state.waiting[:length], state.waiting[length:]
            orders.append(self._link_tube(self.segment_tube(frames), state))
            state.begun, state.frames = end, state.frames + length
        return orders

    def _link_tube(self, tube: Tube, state: TubeLinkInstancesState) -> Tensor:
        queries = tube.queries
        order = torch.arange(len(queries), device=queries.device) if state.queries is None else match(state.queries, queries)
        logits = tube.logits[order]
        state.queries, state.tubes = queries[order], state.tubes + 1
        state.logits = logits if state.logits is None else state.logits + logits
        slots = order.argsort().tolist()
        for t in range(len(tube.pixels)):
            state.masks.append(tube.masks(t), slots)
        return order


def tube_ends(frames: int, tube: int) -> list[int]:
    """Where the tubes of a chunk end: of equal length, but for the last ones, which are a frame shorter each or, if that will not do,
    but for the last one."""
    count = -(-frames // tube)
    spare = count * tube - frames
    ends = [tube * (i + 1) for i in range(count)]
    if spare >= count:
        return [*ends[:-1], frames]
    return [end - max(spare - i, 0) for i, end in zip(range(count - 1, -1, -1), ends)]


@lru_cache(maxsize=256)
def sure_ends(frames: int, tube: int, chunk: int) -> list[int]:
    """Of a chunk's tubes those whose ends are the same however many frames, up to `chunk`, will follow the `frames` that are there."""
    ends = []
    for each in zip(*(tube_ends(n, tube) for n in range(frames, chunk + 1))):
        if len(set(each)) > 1:
            break
        ends.append(each[0])
    return ends
