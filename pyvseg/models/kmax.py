# SPDX-License-Identifier: Apache-2.0
"""kMaX-DeepLab (Yu et al., ECCV 2022): panoptic segmentation of images; the network of Video-kMaX too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyvseg.layers.kmax_backbones import RESNET50, ConvNeXtSizes, ResNetSizes
from pyvseg.layers.kmax_decoder import Decoder, FramePixels, LayerResult
from pyvseg.layers.kmax_pixel_decoder import PixelDecoder
from pyvseg.layers.kmax_predictor import Prediction


@dataclass(frozen=True)
class KMaXSettings:
    """Sizes of one variant.

    things          classes that are objects
    image_size      (height, width) that every frame is padded to: the sums over positions and their batch norms know no other
    widths, blocks  of the pixel decoder's stages, coarsest first
    layers          of the transformer decoder at strides 32, 16, 8
    drop            rate of stochastic depth in the transformer decoder
    """

    classes: int = 133
    things: tuple[int, ...] = tuple(range(80))
    backbone: ResNetSizes | ConvNeXtSizes = RESNET50
    queries: int = 128
    image_size: tuple[int, int] = (1281, 1281)
    widths: tuple[int, ...] = (512, 256, 128, 64)
    blocks: tuple[int, ...] = (1, 5, 1, 1)
    axial: tuple[bool, ...] = (True, True, False, False)
    layers: tuple[int, ...] = (2, 2, 2)
    ffn: int = 2048
    drop: float = 0.2
    mean: tuple[float, float, float] = (127.5,) * 3
    std: tuple[float, float, float] = (127.5,) * 3


class KMaX(nn.Module):
    """The network of one variant; see `KMaXSettings`."""

    def __init__(self, settings: KMaXSettings) -> None:
        super().__init__()
        self.settings = s = settings
        self.backbone = s.backbone.build()
        self.pixel_decoder = PixelDecoder(self.backbone.channels, s.widths, s.blocks, s.axial)
        self.decoder = Decoder([4 * w for w in s.widths], s.layers, classes=s.classes, queries=s.queries, ffn=s.ffn, drop=s.drop)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.cluster_centers.device

    def encode(self, images: Tensor) -> FramePixels:
        """Normalised images (B, 3, *image_size), padded with zeros -> what the clips that they are in need of them."""
        return self.decoder.encode(self.pixel_decoder(self.backbone(images.to(self.dtype))))

    def forward(self, images: Tensor, *, auxiliary: bool = False) -> tuple[Prediction, list[LayerResult]]:
        """Images, each on its own."""
        return self.decoder([self.encode(images)], auxiliary=auxiliary)
