# SPDX-License-Identifier: Apache-2.0
"""Feature pyramids of the K-Net family: from a backbone's maps to two maps at stride 8."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.position import sine_code_2d

GROUPS = 32  # of every group norm


class FPN(nn.Module):
    """Feature pyramid network (Lin et al., 2017): coarse maps flow into finer ones, all `width` channels wide."""

    def __init__(self, channels: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        for conv in (*self.lateral, *self.output):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps (B, channels[i], h_i, w_i), finest first -> as many of the same sizes, (B, width, h_i, w_i)."""
        coarser, results = None, []
        for lateral, output, x in zip(reversed(self.lateral), reversed(self.output), reversed(maps)):
            coarser = _plus(lateral, x, None if coarser is None else F.interpolate(coarser, x.shape[2:], mode="nearest"))
            results.append(output(coarser))
        return results[::-1]


def _plus(conv: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """conv(x) + residual, for a convolution or for the fast module that replaces it at inference."""
    if residual is None or not isinstance(conv, nn.Conv2d):
        return conv(x) if residual is None else conv(x, residual=residual)
    return conv(x) + residual


class ConvGN(nn.Module):
    """relu(norm(conv(x)))"""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.gn = nn.GroupNorm(GROUPS, outputs)
        nn.init.normal_(self.conv.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.gn(self.conv(x)).relu_()


class SemanticFPN(nn.Module):
    """Four maps at strides 4 to 32 become one sum at stride 8, of which two branches are made: where things are, and what. With
    `depth` a third: how far."""

    def __init__(self, width: int, depth: bool = False) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.ModuleList(ConvGN(width, width, 3, 1 if i else 2) for _ in range(max(i, 1))) for i in range(4)
        )
        self.localization, self.semantic = ConvGN(width, width), ConvGN(width, width)
        self.depth = ConvGN(width, width) if depth else None

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        """(B, C, h, w) at strides 4, 8, 16, 32 -> two or three of (B, C, h, w) at stride 8."""
        coarsest = maps[-1]
        code = sine_code_2d(*coarsest.shape[2:], coarsest.shape[1], coarsest.device, coarsest.dtype)
        maps = [*maps[:-1], coarsest + code.view(*coarsest.shape[2:], -1).permute(2, 0, 1)]
        total = sum(self._level(convs, x) for convs, x in zip(self.levels, maps))
        return tuple(branch(total) for branch in (self.localization, self.semantic, self.depth) if branch is not None)

    def _level(self, convs: nn.ModuleList, x: Tensor) -> Tensor:
        """Up to stride 8: twice as large after each convolution but the last."""
        for conv in convs[:-1]:
            x = F.interpolate(conv(x), scale_factor=2, mode="bilinear", align_corners=False)
        return convs[-1](x)
