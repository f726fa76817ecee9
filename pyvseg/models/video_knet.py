# SPDX-License-Identifier: Apache-2.0
"""Video K-Net (Li et al., CVPR 2022) for panoptic segmentation: K-Net frame by frame, whose kernels of the last stage look at
those of the frame before and tell which thing is which."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from pyvseg.layers.graphs import graphed
from pyvseg.layers.kernel_head import Refined, Way
from pyvseg.layers.kernel_init import KernelFrames
from pyvseg.models.categories import KITTI_STEP_THINGS
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.knet import KNet, KNetSettings
from pyvseg.models.knet_panoptic import FramePanoptic, MergeSettings, merge
from pyvseg.models.quasi_dense import Detections, Matched, QuasiDenseSettings, QuasiDenseState, track
from pyvseg.models.video_kmax import PanopticFrame


def things_first(things: tuple[int, ...], classes: int) -> tuple[int, ...]:
    """The data set's category of each class of the model."""
    return (*things, *(c for c in range(classes) if c not in things))


@dataclass(frozen=True)
class VideoKNetSettings(KNetSettings):
    """categories     of the data set, of each class; category 0 is stuff
    track_layers   of the perceptron that makes embeddings for tracking, without the last
    compat         as published, where it goes wrong: after a duplicate that the tracker left out the next things take each other's ids"""

    classes: int = 19
    stuff: int = 17
    categories: tuple[int, ...] = things_first(KITTI_STEP_THINGS, 19)
    link: Way | None = "attention"
    track_layers: int = 2
    compat: bool = True
    upsample: int = 4
    merge: MergeSettings = MergeSettings()
    tracking: QuasiDenseSettings = QuasiDenseSettings()

    @property
    def things(self) -> tuple[int, ...]:
        """Categories that are things."""
        return self.categories[: self.classes - self.stuff]


class TrackEmbedding(nn.Module):
    """What a thing is recognised by, of its linked kernel."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.fcs = nn.Sequential(nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU())
        self.fc, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.layers = nn.ModuleList(nn.Linear(channels, channels) for _ in range(layers))

    def forward(self, kernels: Tensor) -> Tensor:
        """(N, C) -> (N, C)"""
        x = self.fc(self.fcs(kernels))
        for layer in self.layers:
            x = layer(x).relu()
        return self.out(x)


@dataclass
class VideoKNetState:
    """What a video's later frames depend on; of bounded size.

    written   frames whose result is out
    kernels   (1, N, C) of the frame before
    """

    size: FrameSize
    written: int = 0
    kernels: Tensor | None = None
    tracks: QuasiDenseState = field(default_factory=QuasiDenseState)


class FrameSegments(NamedTuple):
    """One frame before tracking: what the last stage said, and the segments."""

    refined: Refined
    panoptic: FramePanoptic


class VideoKNet(KNet):
    divisor = 10_000  # between a category and an object's id in results

    def __init__(self, settings: VideoKNetSettings) -> None:
        super().__init__(settings)
        if 0 in settings.things:
            raise ValueError("category 0 must be stuff: a thing of it that is not followed would have the value of void")
        self.embed = self.make_embedding()

    def make_embedding(self) -> nn.Module:
        return TrackEmbedding(self.settings.channels, self.settings.track_layers)

    def new_state(self, height: int, width: int) -> VideoKNetState:
        """For a video of that size."""
        return VideoKNetState(FrameSize.of(height, width, None))

    def encode_frames(self, images: np.ndarray, state: VideoKNetState) -> list[KernelFrames]:
        """uint8 RGB (T, H, W, 3) -> the frames, for `step`."""
        s = self.settings
        frames = graphed(self.encode, state.size.input(images, s.mean, s.std, self.device))
        return [KernelFrames(*parts) for parts in zip(*(part.split(1) for part in frames))]

    def step(self, frames: list[KernelFrames], state: VideoKNetState, *, last: bool = False) -> list[PanopticFrame]:
        """The results of the video's next frames, encoded. Things that are not followed have id 0, stuff has 1."""
        return [self._frame(self.segment_clip(frame, state), state) for frame in frames]

    def segment_clip(self, frame: KernelFrames, state: VideoKNetState) -> FrameSegments:
        s = self.settings
        refined = self.stages[-1](frame.features, frame.kernels, frame.masks, state.kernels)
        state.kernels = refined.kernels
        scores = refined.classes[0].float().sigmoid()
        return FrameSegments(refined, merge(scores, refined.masks[0], frame.semantic[0], state.size, s.stuff, s.upsample, s.merge))

    def detections(self, clip: FrameSegments) -> Detections:
        """The frame's things as the tracker takes them."""
        things = [segment for segment in clip.panoptic.segments if segment.is_thing]
        scores = np.array([each.score for each in things], np.float32)
        labels = np.array([each.category for each in things], np.int64)
        embeddings = self.embed(clip.refined.linked[0, [each.kernel for each in things]]).float().cpu().numpy()
        return Detections(np.concatenate([clip.panoptic.boxes, scores[:, None]], 1), labels, embeddings)

    def link(self, clip: FrameSegments, state: VideoKNetState) -> list[int]:
        """The ids of the things, in their order: from 1, 0 for what is not followed."""
        ids = [0] * len(clip.panoptic.boxes)
        if ids:
            matched = self.track(self.detections(clip), state)
            rows = range(len(matched.kept)) if self.settings.compat else matched.kept.tolist()
            for row, name in zip(rows, matched.ids.tolist()):
                ids[row] = max(name, -1) + 1
        return ids

    def track(self, found: Detections, state: VideoKNetState) -> Matched:
        return track(state.tracks, found, state.written, self.settings.tracking)

    def _frame(self, clip: FrameSegments, state: VideoKNetState) -> PanopticFrame:
        ids, s = iter(self.link(clip, state)), self.settings
        segments = clip.panoptic.segments
        values = [s.categories[each.category] * self.divisor + (next(ids) if each.is_thing else 1) for each in segments]
        found = {(value, value // self.divisor, each.is_thing) for value, each in zip(values, segments)}
        state.written += 1
        return PanopticFrame(state.written - 1, np.array([0, *values], np.int32)[clip.panoptic.labels], sorted(found))
