# SPDX-License-Identifier: Apache-2.0
"""Deformable DETR (Zhu et al., ICLR 2021) with iterative box refinement over one feature map, and the layers that the TransVOD
systems put behind it: all that they share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyvseg.layers.attention import MLP, Attention, FeedForward
from pyvseg.layers.pixel_decoder import EncoderLayer, centres
from pyvseg.layers.position import sine_code_2d
from pyvseg.ops import MSDeformAttn, ms_deform_attn

Grid = tuple[int, int]


class Detections(NamedTuple):
    """What the detector makes of B images.

    memory    (B, h * w, C) encoded pixels, row by row
    queries   (B, Q, C) after the last layer
    boxes     (B, Q, 4) refined by every layer: centre x, y, width, height, as parts of the image
    position  (h * w, C) code of the pixels, the same for all images
    grid      (h, w)
    """

    memory: Tensor
    queries: Tensor
    boxes: Tensor
    position: Tensor
    grid: Grid


class DecoderLayer(nn.Module):
    """Queries look at each other, then at the pixels around their boxes."""

    def __init__(self, width: int, heads: int, points: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attn = MSDeformAttn(width, 1, heads, points)
        self.norm1 = nn.LayerNorm(width)
        self.ffn = FeedForward(width, hidden)

    def forward(self, x: Tensor, embed: Tensor | None, references: Tensor, memory: Tensor, grid: Grid, *, spread: int = 1) -> Tensor:
        """x (B or 1, Q, C), embed (Q, C) added where queries look, references (B, Q, 2 or 4), memory (B, h * w, C) -> (B, Q, C).

        spread   R: where (query, head) pair i looks is where pair i // R was to look; see `_attend_spread`
        """
        query = x if embed is None else x + embed
        x = self.norm2(self.self_attn(query, query, x, residual=x)).expand(len(memory), -1, -1)
        query = x if embed is None else x + embed
        if spread == 1:
            looked = self.cross_attn(query, references[:, :, None], memory, [grid])
        else:
            looked = _attend_spread(self.cross_attn, query, references, memory, grid, spread)
        return self.ffn(self.norm1(x + looked))


def _attend_spread(attention: MSDeformAttn, query: Tensor, boxes: Tensor, memory: Tensor, grid: Grid, spread: int) -> Tensor:
    """`attention` as the temporal decoders of TransVOD and TransVOD++ were trained: their operator got the sampling locations `spread`
    times over but not the weights, and reads both as flat memory."""
    heads, points = attention.n_heads, attention.n_points
    value = attention.value_proj(memory).unflatten(-1, (heads, -1))
    offsets = attention.sampling_offsets(query).unflatten(-1, (heads, 1, points, 2)).float()
    weights = attention.attention_weights(query).unflatten(-1, (heads, 1, points)).float().softmax(-1)
    boxes = boxes[:, :, None, None, None]
    locations = boxes[..., :2] + offsets / points * boxes[..., 2:] * 0.5
    pairs = torch.arange(locations.shape[1] * heads, device=query.device) // spread
    locations = locations.flatten(1, 2)[:, pairs].view_as(locations)
    return attention.output_proj(ms_deform_attn(value, [grid], locations, weights).to(query.dtype))


class QueryLayer(nn.Module):
    """A temporal query encoder: queries look at each other, then at those of other frames; no positions."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attn = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.ffn = FeedForward(width, hidden)

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        """x (B, N, C), others (B, M, C) -> (B, N, C)"""
        x = self.norm2(self.self_attn(x, x, x, residual=x))
        return self.ffn(self.norm1(self.cross_attn(x, others, others, residual=x)))


class DeformableDETR(nn.Module):
    """One feature map to queries and their boxes.

    inputs          channels of the map
    width           channels inside, a multiple of 32
    hidden          of the feed-forward layers
    classes         logits of a query
    """

    GROUPS = 32

    def __init__(
        self, inputs: int, *, width: int, heads: int, points: int, hidden: int, queries: int, classes: int, encoder_layers: int, decoder_layers: int
    ) -> None:
        super().__init__()
        self.input_proj = nn.Sequential(nn.Conv2d(inputs, width, 1), nn.GroupNorm(self.GROUPS, width))
        self.level_embed = nn.Parameter(torch.randn(1, width))
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, 1, points, hidden) for _ in range(encoder_layers))
        self.query_embed = nn.Embedding(queries, 2 * width)
        self.reference_points = nn.Linear(width, 2)
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, points, hidden) for _ in range(decoder_layers))
        self.class_embed = nn.ModuleList(class_head(width, classes) for _ in range(decoder_layers))
        self.bbox_embed = nn.ModuleList(box_head(width) for _ in range(decoder_layers))
        nn.init.xavier_uniform_(self.input_proj[0].weight)
        nn.init.zeros_(self.input_proj[0].bias)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)
        nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)

    def forward(self, image: Tensor) -> Detections:
        """(B, inputs, h, w)"""
        return self.layers(image)[-1]

    def layers(self, image: Tensor) -> list[Detections]:
        """After every layer of the decoder."""
        memory, position, grid = self.encode(self.input_proj(image))
        embed, x = self.query_embed.weight.chunk(2, 1)
        boxes = self.first_boxes().expand(len(memory), -1, -1)
        x, found = x[None], []
        for layer, head in zip(self.decoder, self.bbox_embed):
            x = layer(x, embed, boxes, memory, grid)
            boxes = moved(boxes, head(x)).detach()
            found.append(Detections(memory, x, boxes, position, grid))
        return found

    def first_boxes(self) -> Tensor:
        """(1, Q, 2) centres where the queries begin, the same in every image."""
        return self.reference_points(self.query_embed.weight.chunk(2, 1)[0])[None].float().sigmoid()

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor, Grid]:
        """(B, C, h, w) -> memory, position, grid of `Detections`"""
        grid = tuple(image.shape[-2:])
        position = sine_code_2d(*grid, image.shape[1], image.device, image.dtype, True) + self.level_embed
        where = centres(*grid, image.device)[None, :, None].expand(len(image), -1, -1, -1)
        x = image.flatten(2).transpose(1, 2)
        for layer in self.encoder:
            x = layer(x, position, [grid], where)
        return x, position, grid


def moved(references: Tensor, delta: Tensor) -> Tensor:
    """Boxes (B, Q, 4) after a step `delta` (B, Q, 4) from references (B, Q, 2 or 4), in the space before the sigmoid. In float32:
    bfloat16 has 256 steps from one side of an image to the other."""
    known, delta = references.shape[-1], delta.float()
    return torch.cat([delta[..., :known] + inverse_sigmoid(references.float()), delta[..., known:]], -1).sigmoid()


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def class_head(width: int, classes: int) -> nn.Linear:
    """Every class starts at a probability of 1 %."""
    head = nn.Linear(width, classes)
    nn.init.constant_(head.bias, -4.59512)
    return head


def box_head(width: int) -> MLP:
    """It starts as a step of nothing."""
    head = MLP(width, width, 4)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    return head
