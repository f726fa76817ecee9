# SPDX-License-Identifier: Apache-2.0
"""Convolutions and linear layers with batch norms, as kMaX-DeepLab (Yu et al., ECCV 2022) puts them."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pyvseg.layers.packed import packed_conv, packs

BATCH_NORM = {"eps": 1e-3, "momentum": 0.01}
batch_norm = partial(nn.BatchNorm2d, **BATCH_NORM)


class ConvBN(nn.Module):
    """bn(conv(x)), with `act` gelu of that. A depthwise convolution has `groups` equal to both widths."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, *, act: bool = False, bias: bool = False, groups: int = 1, init: float = 1.0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias, groups=groups)
        self.bn, self.act = batch_norm(outputs), act
        nn.init.constant_(self.bn.weight, init)
        initialise(self.conv, inputs)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """With `residual` added before gelu."""
        if not isinstance(self.conv, nn.Conv2d):
            return self.conv(x, residual=residual, gelu=self.act)
        if self.conv.groups > 1 and self.act and isinstance(self.bn, nn.Identity) and packs(x, self.conv.weight):
            return packed_conv(self.conv, self.conv.weight, x, None, "gelu")
        x = self.bn(self.conv(x))
        x = x if residual is None else x + residual
        return F.gelu(x) if self.act else x

    def affine(self) -> tuple[Tensor, Tensor]:
        """Of a 1x1 convolution in evaluation mode: (weight (O, I), bias (O,)) of the linear map that it is."""
        weight, bias, bn = self.conv.weight, self.conv.bias, self.bn
        if isinstance(bn, nn.BatchNorm2d):
            weight, bias = fuse_conv_bn_weights(weight, bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        return weight.flatten(1), weight.new_zeros(len(weight)) if bias is None else bias


class LinearBN(nn.Module):
    """bn(linear(x)) of (..., C), with `act` gelu of that; the statistics are those of all rows."""

    def __init__(self, inputs: int, outputs: int, *, act: bool = False, init: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Linear(inputs, outputs, bias=False)
        self.bn, self.act = nn.BatchNorm1d(outputs, **BATCH_NORM), act
        nn.init.constant_(self.bn.weight, init)
        initialise(self.conv, inputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x.flatten(0, -2)).view_as(x)
        return F.gelu(x) if self.act else x


def initialise(layer: nn.Module, inputs: int) -> None:
    """As published: depthwise kernels uniform (Xavier), others normal of variance 2 / inputs, truncated at two deviations."""
    if layer.weight.ndim == 4 and layer.weight.shape[1] == 1:
        nn.init.xavier_uniform_(layer.weight)
    else:
        std = math.sqrt(2 / inputs)
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of (B, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: in training, whole samples of x (B, ...) are zero with probability `rate`, the others grow."""
    if not training or rate == 0:
        return x
    kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * kept / (1 - rate)


def linear_weights(weights: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Published convolutions over sequences, of width 1, are linear layers here."""
    return {key: w[..., 0] if key.endswith("conv.weight") and w.ndim == 3 and w.shape[-1] == 1 else w for key, w in weights.items()}
