# SPDX-License-Identifier: Apache-2.0
"""Mask2Former for video (Cheng et al., 2021): the whole video is one clip, every query yields one mask through all of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyvseg.layers.pixel_decoder import PixelFeatures
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.mask2former import Mask2Former
from pyvseg.models.video_instances import Selection, VideoInstances, render

TOP = 10  # tracks in a result


@dataclass
class ClipState:
    """The features of the frames so far. The model is offline: memory grows with the video."""

    size: FrameSize
    features: list[PixelFeatures] = field(default_factory=list)


class Mask2FormerVideo(Mask2Former):
    """Of a settings with `joint`."""

    def new_state(self, size: FrameSize) -> ClipState:
        return ClipState(size)

    def segment_clip(self, features: PixelFeatures, state: ClipState) -> PixelFeatures:
        return features

    def link(self, clip: PixelFeatures, state: ClipState) -> None:
        state.features.append(clip._replace(finest=clip.finest.new_empty(0)))  # only VITA looks at it; it is two fifths of the memory

    def finish(self, state: ClipState, top: int | None = None, compat: bool = True) -> VideoInstances:
        """Queries see all frames; masks are made for the best queries only, frame by frame."""
        features = joined(state.features)
        *_, queries = self.decoder.refine(features)
        chosen = Selection.best(self.decoder.class_embed(queries)[0].float().softmax(-1)[:, :-1], top or TOP, compat=compat)
        embeddings = self.decoder.mask_embed(queries)[0]

        def logits_at(frame: int, objects: list[int]) -> tuple[list[int], Tensor]:
            masks = features.masks[frame]
            return list(range(len(objects))), (embeddings[objects] @ masks.flatten(1)).unflatten(1, masks.shape[1:])

        return render(chosen, len(features.masks), state.size, logits_at, device=self.device)


def joined(parts: list[PixelFeatures]) -> PixelFeatures:
    levels = [torch.cat(level) for level in zip(*(part.levels for part in parts))]
    return PixelFeatures(torch.cat([part.masks for part in parts]), levels, torch.cat([part.finest for part in parts]))
