# SPDX-License-Identifier: Apache-2.0
"""Video-kMaX (Shin et al., WACV 2024): kMaX-DeepLab on clips, whose segments are linked from clip to clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyvseg.layers.graphs import graphed
from pyvseg.layers.kmax_backbones import DEEPLAB2_RESNET50, ConvNeXtSizes, ResNetSizes
from pyvseg.layers.kmax_decoder import FramePixels, LayerPixels
from pyvseg.layers.kmax_predictor import Prediction
from pyvseg.models.kmax import KMaX, KMaXSettings
from pyvseg.models.kmax_panoptic import ClipPanoptic, PanopticSettings, panoptic_clip
from pyvseg.models.kmax_size import KMaXSize
from pyvseg.models.panoptic_linking import Linked, LinkSettings, LinkState, join_within, link


@dataclass(frozen=True)
class VideoKMaXSettings(KMaXSettings):
    """clip_length   frames that share their queries; with 1 (online) only the memory links them, else clips overlap by a frame"""

    classes: int = 124
    backbone: ResNetSizes | ConvNeXtSizes = DEEPLAB2_RESNET50
    image_size: tuple[int, int] = (897, 1601)
    clip_length: int = 2
    panoptic: PanopticSettings = PanopticSettings()
    linking: LinkSettings = LinkSettings()


class PanopticFrame(NamedTuple):
    """One frame of the result.

    values     (H, W) int32: category * divisor + id, 0 = void
    segments   (value, category, is_thing) of each segment in the frame, by rising value
    depth      float32 (H, W) in metres, of models that see it
    """

    index: int
    values: np.ndarray
    segments: list[tuple[int, int, bool]]
    depth: np.ndarray | None = None


@dataclass
class VideoKMaXState:
    """What a video's later frames depend on; of bounded size.

    start     first frame of the next clip
    pixels    of the frames from there on
    written   frames whose result is out
    """

    size: KMaXSize
    start: int = 0
    written: int = 0
    pixels: list[FramePixels] = field(default_factory=list)
    links: LinkState = field(default_factory=LinkState)


class VideoKMaX(KMaX):
    def __init__(self, settings: VideoKMaXSettings) -> None:
        super().__init__(settings)
        self.things = frozenset(settings.things)

    def new_state(self, height: int, width: int) -> VideoKMaXState:
        """For a video of that size."""
        return VideoKMaXState(KMaXSize.fit((height, width), self.settings.image_size))

    def input(self, images: Sequence[np.ndarray] | np.ndarray, state: VideoKMaXState) -> Tensor:
        """T images, uint8 RGB (H, W, 3) -> the network's input."""
        return state.size.input(images, self.settings.mean, self.settings.std, self.device)

    @property
    def divisor(self) -> int:
        """Between a category and an object's id in results."""
        return self.settings.linking.divisor

    def encode_frames(self, images: Sequence[np.ndarray] | np.ndarray, state: VideoKMaXState) -> list[FramePixels]:
        """T images, uint8 RGB (H, W, 3) -> the frames, for `step`."""
        return graphed(self.encode, self.input(images, state)).split()

    def step(self, frames: list[FramePixels], state: VideoKMaXState, *, last: bool = False) -> list[PanopticFrame]:
        """Takes the video's next frames, encoded; returns the results that they complete, in order. `last`: no more will come."""
        state.pixels += frames
        total, results = state.start + len(state.pixels), []
        while state.written < total and (last or len(state.pixels) >= self.settings.clip_length):
            results += self._clip(state, total)
        return results

    def _clip(self, state: VideoKMaXState, total: int) -> list[PanopticFrame]:
        """The next clip; behind the end of the video its last frame stands still."""
        length = self.settings.clip_length
        pixels = state.pixels[:length] + state.pixels[-1:] * (length - len(state.pixels))
        clip = self.segment_clip(pixels, state)
        linked = self.link(clip, state)
        offset = state.written - state.start
        # Published: with two frames every other clip is there for linking only. Longer clips, which the published code cannot
        # write, give all that is new in them.
        offsets = range(0) if length == 2 and offset else range(offset, min(length, total - state.start))
        results = [self._frame(state.start + t, clip, linked, t) for t in offsets]
        state.written += len(results)
        advance = max(length - 1, 1)
        state.start, state.pixels = state.start + advance, state.pixels[advance:]
        return results

    def predict(self, *maps: Tensor) -> tuple:
        """The fields of a clip's `Prediction`, from the tensors of its frames' `FramePixels` one after the other."""
        each = 2 * len(self.decoder.layers) + 1
        frames = [maps[i : i + each] for i in range(0, len(maps), each)]
        pixels = [FramePixels([LayerPixels(*pair) for pair in zip(frame[:-1:2], frame[1::2])], frame[-1]) for frame in frames]
        prediction, _ = self.decoder(pixels)
        return tuple(vars(prediction).values())

    def segment_clip(self, pixels: list[FramePixels], state: VideoKMaXState) -> ClipPanoptic:
        prediction = Prediction(*graphed(self.predict, *tree_leaves(pixels)))
        clip = panoptic_clip(prediction, 0, self.things, state.size, self.settings.panoptic)
        return join_within(clip, self.settings.linking) if self.settings.linking.within_clips else clip

    def link(self, clip: ClipPanoptic, state: VideoKMaXState) -> Linked:
        return link(clip, state.start, self.settings.clip_length > 1, state.links, self.settings.linking)

    def _frame(self, index: int, clip: ClipPanoptic, linked: Linked, t: int) -> PanopticFrame:
        labels = clip.labels[t]
        present = np.flatnonzero(np.bincount(labels.ravel(), minlength=len(linked.values)))
        found = {int(linked.values[s]): clip.segments[s - 1] for s in present if s}
        return PanopticFrame(index, linked.values[labels], [(v, found[v].category, found[v].is_thing) for v in sorted(found)])
