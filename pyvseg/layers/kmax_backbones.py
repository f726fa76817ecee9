# SPDX-License-Identifier: Apache-2.0
"""The backbones of kMaX-DeepLab and Video-kMaX by their sizes: four maps at strides 4, 8, 16, 32, batch norms that train."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from pyvseg.layers.backbones import RESNETS
from pyvseg.layers.convnext import ConvNeXt
from pyvseg.layers.normed import batch_norm
from pyvseg.layers.resnet import Bottleneck, ResNet


@dataclass(frozen=True)
class ResNetSizes:
    """A ResNet; `outputs` are the channels of its stride-4 map, `width` those inside that stage.

    unactivated   the ResNet of DeepLab2, which Video-kMaX was trained with: the same parameters, another network. See `DeepLab2ResNet`.
    """

    depth: int = 50
    stem: int = 64
    outputs: int = 256
    width: int = 64
    unactivated: bool = False

    def build(self) -> nn.Module:
        block, blocks = RESNETS[self.depth]
        sizes = {"width": self.width, "stem": self.stem, "outputs": self.outputs, "norm": batch_norm}
        return DeepLab2ResNet(blocks, **sizes) if self.unactivated else ResNet(blocks, block, **sizes)


@dataclass(frozen=True)
class ConvNeXtSizes:
    widths: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    drop: float = 0.0

    def build(self) -> nn.Module:
        return ConvNeXt(self.widths, self.depths, self.drop)


class UnactivatedBottleneck(Bottleneck):
    """A bottleneck that activates what comes in instead of what goes out."""

    activates_input, activates_output = True, False

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu() if self.downsample else x.relu_()  # what a stage begins with is another one's result
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y)).relu_()
        return self.bn3(self.conv3(y)).add_(x if self.downsample is None else self.downsample(x))


class DeepLab2ResNet(ResNet):
    """A ResNet of bottlenecks without pooling, whose every stage begins with a stride of 2, and whose maps are not activated."""

    def __init__(self, blocks: tuple[int, ...], **sizes) -> None:
        super().__init__(blocks, UnactivatedBottleneck, first_stride=2, **sizes)

    def stem(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))

    def for_inference(self) -> nn.Module:
        """Within a stage the ReLU goes into the convolution before it."""
        for i in range(len(self.channels)):
            for block, following in pairwise(getattr(self, f"layer{i + 1}")):
                block.activates_output, following.activates_input = True, False
        return self


RESNET50 = ResNetSizes()
DEEPLAB2_RESNET50 = ResNetSizes(unactivated=True)
CONVNEXT_T = ConvNeXtSizes()
CONVNEXT_S = ConvNeXtSizes(depths=(3, 3, 27, 3))
CONVNEXT_B = ConvNeXtSizes((128, 256, 512, 1024), (3, 3, 27, 3))
CONVNEXT_L = ConvNeXtSizes((192, 384, 768, 1536), (3, 3, 27, 3))
