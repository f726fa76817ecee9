# SPDX-License-Identifier: Apache-2.0
"""The pixel decoder of kMaX-DeepLab (Yu et al., ECCV 2022): axial attention on coarse maps, convolutions on fine ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.kmax_axial import AxialAttention
from pyvseg.layers.normed import ChannelNorm, ConvBN


class PixelDecoder(nn.Module):
    """Backbone maps at strides 4, 8, 16, 32 -> maps at strides 32, 16, 8, 4 of 4 * width channels.

    channels   of the backbone's maps, finest first
    widths     of the blocks, coarsest first; so are
    blocks     how many there are, and
    axial      which stages attend along the axes
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], blocks: Sequence[int], axial: Sequence[bool]) -> None:
        super().__init__()
        coarsest, *finer = reversed(channels)
        self.in_norms = nn.ModuleList(ChannelNorm(c) for c in (coarsest, *finer))
        self.stages, self.resized_fuses = nn.ModuleList(), nn.ModuleList()
        for i, (width, count) in enumerate(zip(widths, blocks)):
            inputs = width if i else coarsest
            self.stages.append(nn.Sequential(*(Block(4 * width if j else inputs, width, axial[i]) for j in range(count))))
        for i, high in enumerate(finer):
            self.resized_fuses.append(ResizedFuse(4 * widths[i], high, widths[i + 1]))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        coarsest, *finer = (norm(x) for norm, x in zip(self.in_norms, reversed(features)))
        maps = [self.stages[0](coarsest)]
        for stage, fuse, high in zip(self.stages[1:], self.resized_fuses, finer):
            maps.append(stage(fuse(maps[-1], high)))
        return maps


class Block(nn.Module):
    """x = gelu(x); shortcut(x) + conv3(body(conv1(x))). The sum is not activated.

    axial   the body is attention along both axes, else a 3x3 convolution
    """

    def __init__(self, inputs: int, width: int, axial: bool) -> None:
        super().__init__()
        inner, outputs = (2 * width if axial else width), 4 * width
        self.conv1 = ConvBN(inputs, inner, act=True)
        if axial:
            self.attention = AxialAttention(inner, width, 2 * width)
        else:
            self.conv2 = ConvBN(width, width, 3, act=True)
        self.axial = axial
        self.conv3 = ConvBN(inner, outputs, init=0.0)
        self.shortcut = ConvBN(inputs, outputs) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(x)
        y = self.conv1(x)
        y = F.gelu(self.attention(y)) if self.axial else self.conv2(y)
        return self.conv3(y, residual=x if self.shortcut is None else self.shortcut(x))


class ResizedFuse(nn.Module):
    """low, resized to high's size, plus high; each first gelu and a 1x1 convolution where it has not `outputs` channels yet."""

    def __init__(self, low: int, high: int, outputs: int) -> None:
        super().__init__()
        self.conv_bn_low = ConvBN(low, outputs) if low != outputs else None
        self.conv_bn_high = ConvBN(high, outputs) if high != outputs else None

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        low = low if self.conv_bn_low is None else self.conv_bn_low(F.gelu(low))
        high = high if self.conv_bn_high is None else self.conv_bn_high(F.gelu(high))
        return resize(low, high.shape[-2:], low.shape[-1]).add_(high)


def resize(x: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """Bilinear; corners are aligned where `side` is odd, as everywhere in this family."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=bool(side % 2))
