# SPDX-License-Identifier: Apache-2.0
"""The backbones of the query-based systems by their sizes: four maps at strides 4, 8, 16, 32."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pyvseg.layers.resnet import BasicBlock, Bottleneck, FrozenBatchNorm2d, ResNet
from pyvseg.layers.swin import Swin

RESNETS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


@dataclass(frozen=True)
class ResNetSizes:
    """A ResNet with frozen batch norms; `outputs` are the channels of its stride-4 map, `width` those inside that stage, `dilated` ones
    keep stride 16 in the last stage."""

    depth: int = 50
    stem: int = 64
    outputs: int = 256
    width: int = 64
    dilated: bool = False

    def build(self) -> nn.Module:
        block, blocks = RESNETS[self.depth]
        return ResNet(blocks, block, width=self.width, stem=self.stem, outputs=self.outputs, norm=FrozenBatchNorm2d, dilated=self.dilated)


@dataclass(frozen=True)
class SwinSizes:
    """A Swin Transformer."""

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: int = 4

    def build(self) -> nn.Module:
        return Swin(self.width, self.depths, self.heads, self.window, self.mlp_ratio)


RESNET50, RESNET101 = ResNetSizes(50), ResNetSizes(101)
SWIN_T = SwinSizes()
SWIN_S = SwinSizes(depths=(2, 2, 18, 2))
SWIN_B = SwinSizes(128, (2, 2, 18, 2), (4, 8, 16, 32), 12)
SWIN_L = SwinSizes(192, (2, 2, 18, 2), (6, 12, 24, 48), 12)
