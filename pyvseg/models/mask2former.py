# SPDX-License-Identifier: Apache-2.0
"""Mask2Former (Cheng et al., CVPR 2022) and its joint-clip video form (Cheng et al., 2021).

Every query yields a class and a mask. MinVIS, CTVIS, VITA and GenVIS are built on this network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyvseg.layers.backbones import RESNET50, ResNetSizes, SwinSizes
from pyvseg.layers.mask_decoder import MaskDecoder, Prediction
from pyvseg.layers.pixel_decoder import PixelDecoder, PixelFeatures

PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, 0 to 255


@dataclass(frozen=True)
class Mask2FormerSettings:
    """Sizes of one variant.

    width, mask_width, hidden   channels of the pixel decoder, of the mask features, of the queries
    ffn, encoder_ffn            inner width of the decoder's and of the pixel decoder's feed-forward layers
    joint                       the video model: queries attend to all frames of a clip together
    things                      classes that are objects, for panoptic results; None: all
    short_side, long_side       frames are resized to this shorter side, unless the longer would pass its bound
    """

    classes: int = 40
    queries: int = 100
    backbone: ResNetSizes | SwinSizes = RESNET50
    width: int = 256
    mask_width: int = 256
    hidden: int = 256
    heads: int = 8
    points: int = 4
    encoder_layers: int = 6
    encoder_ffn: int = 1024
    decoder_layers: int = 9
    ffn: int = 2048
    joint: bool = False
    things: tuple[int, ...] | None = None
    short_side: int | None = 360
    long_side: int = 1333
    mean: tuple[float, float, float] = PIXEL_MEAN
    std: tuple[float, float, float] = PIXEL_STD


class Mask2Former(nn.Module):
    """The network of one variant; see `Mask2FormerSettings`."""

    def __init__(self, settings: Mask2FormerSettings) -> None:
        super().__init__()
        self.settings = s = settings
        self.backbone = s.backbone.build()
        self.pixel_decoder = PixelDecoder(
            self.backbone.channels, s.width, s.mask_width, heads=s.heads, points=s.points, layers=s.encoder_layers, hidden=s.encoder_ffn
        )
        self.decoder = MaskDecoder(
            s.width, s.hidden, s.mask_width, classes=s.classes, queries=s.queries, heads=s.heads, hidden=s.ffn,
            layers=s.decoder_layers, joint=s.joint,
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.query_feat.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.query_feat.weight.device

    def encode(self, images: Tensor) -> PixelFeatures:
        """Normalised images (B, 3, H, W), padded to multiples of 32 -> features."""
        return self.pixel_decoder(self.backbone(images.to(self.dtype)))

    framewise = False  # whether clips need nothing of a video's state: then frames of several videos are segmented together, and linked in main memory

    def per_frame(self, images: Tensor) -> NamedTuple:
        """What of a batch of frames depends on each of them alone, the frames first in every tensor."""
        return self.encode(images)

    def forward(self, images: Tensor, *, clips: int = 1, auxiliary: bool = False) -> list[Prediction]:
        """Normalised images (B, 3, H, W) -> the last prediction, or with `auxiliary` all of them, the bare queries' first.

        The joint model takes the frames of `clips` clips, one clip after the other.
        """
        return self.decoder(self.encode(images), clips=clips, auxiliary=auxiliary)
