# SPDX-License-Identifier: Apache-2.0
"""Tube-Link (Li et al., ICCV 2023), video semantic segmentation: every tube stands alone."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvseg.layers.pixel_decoder import PixelFeatures
from pyvseg.models.image_results import semantic_labels
from pyvseg.models.tube_link_maps import TubeMaps, TubeMapsState


class TubeLinkSemantic(TubeMaps):
    """Of a `TubeMapSettings` without things."""

    def maps(self, frames: list[PixelFeatures], state: TubeMapsState) -> tuple[Tensor, Tensor, list[int]]:
        return self.segment_clip(frames, state) + 1, torch.arange(self.settings.classes), [0] * self.settings.classes

    def segment_clip(self, frames: list[PixelFeatures], state: TubeMapsState) -> Tensor:
        """Classes (T, H, W), uint8 or int16; no pixel is void."""
        tube = self.segment_tube(frames)
        kept = torch.uint8 if self.settings.classes < 255 else torch.int16
        probabilities = tube.logits.softmax(-1)[:, :-1]
        return torch.stack([semantic_labels(probabilities, tube.masks(t), state.size).to(kept) for t in range(len(frames))])
