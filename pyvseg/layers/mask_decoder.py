# SPDX-License-Identifier: Apache-2.0
"""The transformer decoder of Mask2Former (Cheng et al., CVPR 2022): queries that look only where their last mask was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.attention import MLP, Attention, FeedForward
from pyvseg.layers.packed import products
from pyvseg.layers.pixel_decoder import PixelFeatures
from pyvseg.layers.position import sine_code_2d, sine_code_3d


class Prediction(NamedTuple):
    """What Q queries say of B images, or of B clips of T frames.

    queries   (B, Q, C) after the decoder's norm, which the heads see
    logits    (B, Q, K + 1) of the classes, the last one is "no object"
    masks     (B, Q, H/4, W/4), or (B, Q, T, H/4, W/4) of clips: logits
    """

    queries: Tensor
    logits: Tensor
    masks: Tensor


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; each adds to the queries and normalises them."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.cross_attn, self.cross_norm = Attention(width, heads), nn.LayerNorm(width)
        self.self_attn, self.self_norm = Attention(width, heads), nn.LayerNorm(width)
        self.ffn = FeedForward(width, hidden)

    def forward(self, x: Tensor, query_embed: Tensor, key: Tensor, value: Tensor, masks: Tensor | None = None) -> Tensor:
        """x (B, Q, C), key and value (B, M, C), masks (B, Q, M) logits -> (B, Q, C).

        A query looks where its mask is not negative, or everywhere.
        """
        x = self.cross_norm(self.cross_attn(x + query_embed, key, value, masks, residual=x))
        placed = x + query_embed
        x = self.self_norm(self.self_attn(placed, placed, x, residual=x))
        return self.ffn(x)


class MaskDecoder(nn.Module):
    """Queries to classes and masks.

    inputs       channels of the pixel decoder's levels
    width        channels of the queries
    mask_width   channels of the mask features
    joint        the queries attend to all frames of a clip together (the video model), not to every image apart
    """

    def __init__(
        self, inputs: int, width: int, mask_width: int, *, classes: int, queries: int, heads: int, hidden: int, layers: int, joint: bool = False
    ) -> None:
        super().__init__()
        self.joint, self.scales = joint, 3
        self.layers = nn.ModuleList(DecoderLayer(width, heads, hidden) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.query_feat = nn.Embedding(queries, width)
        self.query_embed = nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(self.scales, width)
        same = inputs == width
        self.input_proj = nn.ModuleList(nn.Identity() if same else nn.Conv2d(inputs, width, 1) for _ in range(self.scales))
        self.class_embed = nn.Linear(width, classes + 1)
        self.mask_embed = MLP(width, width, mask_width)
        for conv in self.input_proj if not same else ():
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: PixelFeatures, *, clips: int = 1, auxiliary: bool = False) -> list[Prediction]:
        """The last layer's prediction; with `auxiliary` before it those of the bare queries and of every earlier layer.

        clips   a joint decoder splits the images into so many clips of equal length
        """
        states = list(self.refine(features, clips=clips))
        masks = _by_clip(features.masks, self._frames(features, clips))
        return [self.predict(queries, masks) for queries in (states if auxiliary else states[-1:])]

    def refine(self, features: PixelFeatures, *, clips: int = 1) -> Iterator[Tensor]:
        """The normalised queries (B, Q, C): bare, then after every layer."""
        return (queries for _, queries in self.states(features, clips=clips))

    def states(self, features: PixelFeatures, *, clips: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The queries (B, Q, C) as the layers hand them on, and normalised: bare, then after every layer."""
        frames = self._frames(features, clips)
        memory = [self._memory(level, i, frames) for i, level in enumerate(features.levels)]
        small = [_resized(features.masks, level.shape[-2:], frames) for level in features.levels]
        x = self.query_feat.weight.expand(len(small[0]), -1, -1)
        for i, layer in enumerate(self.layers):
            queries = self.decoder_norm(x)
            yield x, queries
            scale = i % self.scales
            x = layer(x, self.query_embed.weight, *memory[scale], self._masks(queries, small[scale]))
        yield x, self.decoder_norm(x)

    def _frames(self, features: PixelFeatures, clips: int) -> int | None:
        return len(features.masks) // clips if self.joint else None

    def predict(self, queries: Tensor, masks: Tensor) -> Prediction:
        """The heads on normalised queries (B, Q, C) and mask features (B, M, [T,] h, w)."""
        logits = products(self.mask_embed(queries), masks.flatten(2))
        return Prediction(queries, self.class_embed(queries), logits.unflatten(2, masks.shape[2:]))

    @torch.no_grad()
    def _masks(self, queries: Tensor, small: Tensor) -> Tensor:
        """(B, Q, M) the queries' masks at the size of the level.

        Published is the resizing of every query's mask. Both steps are linear, so resizing the mask features gives the
        same for a hundredth of the work.
        """
        return products(self.mask_embed(queries), small)

    def _memory(self, level: Tensor, index: int, frames: int | None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, T * h * w, C) of one level."""
        x = self.input_proj[index](level)
        height, width = x.shape[-2:]
        code = (height, width, x.shape[1], x.device, x.dtype)
        value = x.flatten(2).transpose(1, 2).unflatten(0, (-1, frames or 1)).flatten(1, 2) + self.level_embed.weight[index]
        return value + (sine_code_3d(frames, *code) if self.joint else sine_code_2d(*code)), value


def _by_clip(maps: Tensor, frames: int | None) -> Tensor:
    """(B * T, M, h, w) -> (B, M, T, h, w) for clips of T frames; images, where `frames` is None, stay as they are."""
    return maps if frames is None else maps.unflatten(0, (-1, frames)).transpose(1, 2)


@torch.no_grad()
def _resized(maps: Tensor, size: tuple[int, int], frames: int | None) -> Tensor:
    """(B * T, M, H, W) -> (B, M, T * h * w)"""
    small = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    return _by_clip(small, frames).flatten(2)
