# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt (Liu et al., CVPR 2022) with the padding that kMaX-DeepLab gives it: maps of inputs 32 k + 1 are 8 k + 1, 4 k + 1, ..."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.normed import ChannelNorm, drop_path
from pyvseg.layers.packed import Linear


class ConvNeXtBlock(nn.Module):
    """x + gamma * pwconv2(gelu(pwconv1(norm(dwconv(x)))))"""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + drop_path(y.permute(0, 3, 1, 2), self.drop, self.training)

    def for_inference(self) -> nn.Module:
        return _FastConvNeXtBlock(self)


class _FastConvNeXtBlock(nn.Module):
    """gamma inside pwconv2, GELU and the addition inside the linear layers."""

    def __init__(self, block: ConvNeXtBlock) -> None:
        super().__init__()
        self.dwconv, self.norm, self.pwconv1 = block.dwconv, block.norm, Linear(block.pwconv1)
        for parameter in block.pwconv2.parameters():
            parameter.mul_(block.gamma.view(-1, *[1] * (parameter.ndim - 1)))
        self.pwconv2 = Linear(block.pwconv2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1)), gelu=True)
        return self.pwconv2(y, residual=x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """forward: (B, 3, H, W) -> four maps at strides 4, 8, 16, 32, as they leave the stages.

    drop   rate of stochastic depth at the last block; it rises linearly
    """

    def __init__(self, widths: Sequence[int], depths: Sequence[int], drop: float = 0.0) -> None:
        super().__init__()
        self.channels = tuple(widths)
        stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0]))
        steps = [nn.Sequential(ChannelNorm(a), nn.Conv2d(a, b, 2, 2)) for a, b in zip(widths, widths[1:])]
        self.downsample_layers = nn.ModuleList([stem, *steps])
        rates = iter(np.linspace(0, drop, sum(depths)).tolist())
        self.stages = nn.ModuleList(nn.Sequential(*(ConvNeXtBlock(w, next(rates)) for _ in range(n))) for w, n in zip(widths, depths))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, (down, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            # Zeros before the norm: it turns them into its bias.
            x = stage(down(F.pad(x, (0, 1, 0, 1) if i else (1, 2, 1, 2))))
            maps.append(x)
        return maps
