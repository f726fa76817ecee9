# SPDX-License-Identifier: Apache-2.0
"""ResNet trunks (He et al., 2015), torchvision's arrangement: the stride of a bottleneck sits on its 3x3 convolution."""

from __future__ import annotations

from torch import Tensor, nn


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=bias)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(inputs, width, stride, bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y))
        return y.add_(x if self.downsample is None else self.downsample(x)).relu_()


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=bias)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=bias)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _downsample(inputs, 4 * width, stride, bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y)).relu_()
        y = self.bn3(self.conv3(y))
        return y.add_(x if self.downsample is None else self.downsample(x)).relu_()


def _downsample(inputs: int, outputs: int, stride: int, bias: bool) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=bias), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """The trunk of a ResNet without its classifier.

    blocks     residual blocks per stage; its length says how many stages there are
    block      `BasicBlock` (ResNet-18/34) or `Bottleneck` (ResNet-50/101)
    inputs     input channels
    bias       whether the convolutions have a bias (the value encoder of STCN does)
    width      channels of the stem; the stages have `width * 2**i * block.expansion`

    forward takes (B, inputs, H, W) and returns one feature map per stage, at strides 4, 8, 16, ...
    """

    def __init__(
        self, blocks: tuple[int, ...], block: type[nn.Module], *, inputs: int = 3, bias: bool = False, width: int = 64
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 7, 2, 3, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.channels = tuple(width * 2**i * block.expansion for i in range(len(blocks)))
        before = width
        for i, (count, after) in enumerate(zip(blocks, self.channels)):
            stage = [block(before if j == 0 else after, width * 2**i, 2 if i and not j else 1, bias) for j in range(count)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
            before = after

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.bn1(self.conv1(x)).relu_())
        features = []
        for i in range(len(self.channels)):
            x = getattr(self, f"layer{i + 1}")(x)
            features.append(x)
        return features
