# SPDX-License-Identifier: Apache-2.0
"""The pixel decoder of Mask2Former (Cheng et al., CVPR 2022): a deformable transformer encoder over the three coarse maps of
a backbone, and one step of a feature pyramid down to stride 4."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.attention import FastFeedForward
from pyvseg.layers.packed import Linear
from pyvseg.layers.position import sine_code_2d
from pyvseg.ops import MSDeformAttn, ms_deform_attn_fused

Shapes = list[tuple[int, int]]


class PixelFeatures(NamedTuple):
    """What the pixel decoder makes of B images.

    masks    (B, M, H/4, W/4) features whose dot product with a query's mask embedding is its mask
    levels   three maps (B, C, h, w) at strides 32, 16, 8
    finest   (B, C, H/4, W/4), what `masks` are projected from
    """

    masks: Tensor
    levels: list[Tensor]
    finest: Tensor


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, levels: int, points: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(width, levels, heads, points)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor, position: Tensor, shapes: Shapes, centres: Tensor) -> Tensor:
        """Tokens (B, S, C) of the maps, their position codes (S, C), the (height, width) of each map, and where the tokens' pixels
        are: (B, S, levels, 2), normalised (x, y), the same for all levels."""
        x = self.norm1(x + self.self_attn(x + position, centres, x, shapes))
        return self.norm2(x + self.linear2(self.linear1(x).relu_()))

    def for_inference(self) -> nn.Module:
        return _FastEncoderLayer(self)


class _FastEncoderLayer(nn.Module):
    """`EncoderLayer` with additions and ReLU inside its linear layers."""

    def __init__(self, layer: EncoderLayer) -> None:
        super().__init__()
        attention = layer.self_attn
        self.grid = attention.n_heads, attention.n_levels, attention.n_points
        self.value, self.offsets = Linear(attention.value_proj), Linear(attention.sampling_offsets)
        self.weights, self.output = Linear(attention.attention_weights), Linear(attention.output_proj)
        self.norm = layer.norm1
        self.ffn = FastFeedForward(layer.linear1, layer.linear2, layer.norm2)

    def forward(self, x: Tensor, position: Tensor, shapes: Shapes, centres: Tensor) -> Tensor:
        query = x + position
        value = self.value(x).unflatten(-1, (self.grid[0], -1))
        offsets, weights = self.offsets(query).unflatten(-1, (*self.grid, 2)), self.weights(query).unflatten(-1, self.grid)
        sums = ms_deform_attn_fused(value, shapes, centres, offsets, weights)
        return self.ffn(self.norm(self.output(sums, residual=x)))


class PixelDecoder(nn.Module):
    """Backbone maps to `PixelFeatures`.

    channels      of the backbone's maps at strides 4, 8, 16, 32
    width         channels inside, a multiple of 32
    mask_width    channels of the mask features
    heads, points, layers, hidden   of the deformable encoder
    """

    GROUPS = 32

    def __init__(
        self, channels: tuple[int, ...], width: int, mask_width: int, *, heads: int, points: int = 4, layers: int = 6, hidden: int = 1024
    ) -> None:
        super().__init__()
        coarse = channels[:0:-1]
        self.input_proj = nn.ModuleList(nn.Sequential(nn.Conv2d(c, width, 1), nn.GroupNorm(self.GROUPS, width)) for c in coarse)
        self.level_embed = nn.Parameter(torch.randn(len(coarse), width))
        self.layers = nn.ModuleList(EncoderLayer(width, heads, len(coarse), points, hidden) for _ in range(layers))
        self.adapter_1 = nn.Sequential(nn.Conv2d(channels[0], width, 1, bias=False), nn.GroupNorm(self.GROUPS, width))
        self.layer_1 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(self.GROUPS, width), nn.ReLU(inplace=True))
        self.mask_features = nn.Conv2d(width, mask_width, 1)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for conv in (self.adapter_1[0], self.layer_1[0], self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, maps: list[Tensor]) -> PixelFeatures:
        """The backbone's maps (B, channels[i], H/2**(i+2), W/2**(i+2)), finest first."""
        coarse = [projection(x) for projection, x in zip(self.input_proj, maps[:0:-1])]
        shapes = [tuple(x.shape[-2:]) for x in coarse]
        x = self.encode(torch.cat([x.flatten(2).transpose(1, 2) for x in coarse], 1), shapes)
        parts = x.split([h * w for h, w in shapes], 1)
        levels = [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes)]
        lateral = self.adapter_1(maps[0])
        lateral = lateral + F.interpolate(levels[-1], lateral.shape[-2:], mode="bilinear", align_corners=False)
        finest = self.layer_1(lateral)
        return PixelFeatures(self.mask_features(finest), levels, finest)

    def encode(self, x: Tensor, shapes: Shapes) -> Tensor:
        """The deformable encoder: tokens (B, S, C) of the coarse maps, stride 32 first."""
        codes = [sine_code_2d(*shape, x.shape[-1], x.device, x.dtype) for shape in shapes]
        position = torch.cat([code + embed for code, embed in zip(codes, self.level_embed)])
        where = torch.cat([centres(*shape, x.device) for shape in shapes])[None, :, None].expand(len(x), -1, len(shapes), -1)
        for layer in self.layers:
            x = layer(x, position, shapes, where)
        return x


def centres(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 2) normalised (x, y) of every pixel's centre, row by row."""
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1)
