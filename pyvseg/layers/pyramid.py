# SPDX-License-Identifier: Apache-2.0
"""The backbone of TransVOD++ and TransVOD Lite: a Swin Transformer whose maps at strides 8, 16 and 32 become one."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.backbones import SwinSizes
from pyvseg.layers.swin import Swin


class SwinPyramid(Swin):
    """A Swin Transformer, a feature pyramid (Lin et al., CVPR 2017) over its last three maps, and the sum of that at stride 8.

    outputs   channels of the result; all else as in `Swin`

    forward takes (B, 3, H, W) and returns a list of the one map (B, outputs, H/8, W/8), sizes rounded up.
    """

    def __init__(self, width: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int, mlp_ratio: int = 4, *, outputs: int = 256) -> None:
        super().__init__(width, depths, heads, window, mlp_ratio, first=1)
        self.inner = nn.ModuleList(nn.Conv2d(c, outputs, 1) for c in self.channels)
        self.outer = nn.ModuleList(nn.Conv2d(outputs, outputs, 3, padding=1) for _ in self.channels)
        self.channels = (outputs,)
        for conv in (*self.inner, *self.outer):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [inner(x) for inner, x in zip(self.inner, super().forward(x))]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], maps[i - 1].shape[-2:], mode="nearest")
        first, *rest = (outer(x) for outer, x in zip(self.outer, maps))
        for x in rest:
            first = first + F.interpolate(x, first.shape[-2:], mode="bilinear", align_corners=False)
        return [first]


@dataclass(frozen=True)
class SwinPyramidSizes(SwinSizes):
    outputs: int = 256

    def build(self) -> nn.Module:
        return SwinPyramid(self.width, self.depths, self.heads, self.window, self.mlp_ratio, outputs=self.outputs)


SWIN_B_PYRAMID = SwinPyramidSizes(128, (2, 2, 18, 2), (4, 8, 16, 32))
