# SPDX-License-Identifier: Apache-2.0
"""Tube-Link (Li et al., ICCV 2023): the joint-clip Mask2Former on tubes, clips of a few frames; `tube_link_instances`,
`tube_link_panoptic` and `tube_link_semantic` say how the tubes of a video belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyvseg.layers.graphs import graphed
from pyvseg.layers.packed import products
from pyvseg.layers.pixel_decoder import PixelFeatures
from pyvseg.models.mask2former import Mask2Former, Mask2FormerSettings
from pyvseg.models.mask2former_video import joined


@dataclass(frozen=True)
class TubeLinkSettings(Mask2FormerSettings):
    """What the kinds of results have in common."""

    joint: bool = True


class Tube(NamedTuple):
    """What Q queries say of a tube of T frames.

    queries      (Q, C) as the last layer hands them on, before the decoder's norm
    logits       (Q, K + 1) float32, one class for the whole tube
    embeddings   (Q, M), whose dot products with pixels are mask logits
    pixels       (T, M, h, w) at stride 4
    """

    queries: Tensor
    logits: Tensor
    embeddings: Tensor
    pixels: Tensor

    def masks(self, frame: int, queries: Tensor | slice = slice(None)) -> Tensor:
        """Mask logits (N, h, w), float32, of some queries in one frame."""
        pixels = self.pixels[frame]
        return products(self.embeddings[None, queries], pixels[None].flatten(2))[0].unflatten(1, pixels.shape[1:]).float()


class TubeLink(Mask2Former):
    def split(self, features: PixelFeatures) -> list[PixelFeatures]:
        """Frame by frame, without what tubes have no use for."""
        none = features.finest.new_empty(0)
        return [
            PixelFeatures(features.masks[t : t + 1], [level[t : t + 1] for level in features.levels], none) for t in range(len(features.masks))
        ]

    def segment_tube(self, frames: list[PixelFeatures]) -> Tube:
        """Queries see all frames of a tube together."""
        features = joined(frames)
        return Tube(*graphed(self.predict, features.masks, *features.levels), features.masks)

    def predict(self, masks: Tensor, *levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, logits and embeddings of a `Tube`, from the `PixelFeatures` of its frames."""
        *_, (states, queries) = self.decoder.states(PixelFeatures(masks, list(levels), masks.new_empty(0)))
        return states[0], self.decoder.class_embed(queries)[0].float(), self.decoder.mask_embed(queries)[0]


def mmdet_swin(weights: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """Published patch merging (mmdetection) takes its inputs as (C, rows, columns), ours as (columns, rows, C)."""

    def reordered(w: Tensor) -> Tensor:
        return w.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)

    merging = ("downsample.reduction.weight", "downsample.norm.weight", "downsample.norm.bias")
    return {key: reordered(w) if key.startswith("backbone.stages.") and key.endswith(merging) else w for key, w in weights.items()}
