# SPDX-License-Identifier: Apache-2.0
"""K-Net (Zhang et al., NeurIPS 2021): kernels find the masks of an image, stage by stage. The network of Video K-Net, every frame
on its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyvseg.layers.backbones import RESNET50, ResNetSizes, SwinSizes
from pyvseg.layers.fpn import FPN
from pyvseg.layers.kernel_head import KernelHead, Way
from pyvseg.layers.kernel_init import KernelFrames, KernelInit
from pyvseg.models.mask2former import PIXEL_MEAN, PIXEL_STD


@dataclass(frozen=True)
class KNetSettings:
    """Sizes of one variant.

    classes, stuff   all of them, and the last ones of these, which are no things
    kernels          of things; each class of stuff has one more
    link, fuse       of every stage, see `KernelHead`
    upsample         of the last masks before they become probabilities
    """

    classes: int = 40
    stuff: int = 0
    backbone: ResNetSizes | SwinSizes = RESNET50
    channels: int = 256
    kernels: int = 100
    stages: int = 3
    heads: int = 8
    ffn: int = 2048
    link: Way | None = None
    fuse: Way | None = None
    upsample: int = 2
    mean: tuple[float, float, float] = PIXEL_MEAN
    std: tuple[float, float, float] = PIXEL_STD


class KNet(nn.Module):
    """The network of one variant; see `KNetSettings`."""

    def __init__(self, settings: KNetSettings) -> None:
        super().__init__()
        self.settings = s = settings
        self.backbone = s.backbone.build()
        self.fpn = FPN(self.backbone.channels, s.channels)
        self.initial = self.make_initial()
        self.stages = nn.ModuleList(self.make_stage() for _ in range(s.stages))

    def make_initial(self) -> nn.Module:
        s = self.settings
        return KernelInit(s.channels, s.kernels, s.classes, s.stuff)

    def make_stage(self) -> nn.Module:
        s = self.settings
        return KernelHead(s.channels, s.heads, s.ffn, s.classes, s.link, s.fuse)

    @property
    def dtype(self) -> torch.dtype:
        return self.initial.kernels.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.initial.kernels.weight.device

    def encode(self, images: Tensor) -> KernelFrames:
        """Normalised images (B, 3, H, W), padded to multiples of 32 -> the frames before the last stage."""
        frames = self.initial(self.fpn(self.backbone(images.to(self.dtype))))
        for stage in self.stages[:-1]:
            refined = stage(frames.features, frames.kernels, frames.masks)
            frames = frames._replace(kernels=refined.kernels, masks=refined.masks)
        return frames
