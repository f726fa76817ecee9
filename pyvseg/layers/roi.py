# SPDX-License-Identifier: Apache-2.0
"""Features of boxes, and what queries make of them: the query and RoI fusion of TransVOD++, the dynamic head of Sparse R-CNN (Sun et
al., CVPR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvseg.layers.attention import Attention, FeedForward
from pyvseg.ops import ms_deform_attn

CELLS, SAMPLES = 7, 2  # of a box along an axis; of a cell along an axis


def roi_align(features: Tensor, grid: tuple[int, int], boxes: Tensor) -> Tensor:
    """RoIAlign (He et al., ICCV 2017), half a pixel aligned: the mean of 2 x 2 samples in each of 7 x 7 cells of a box.

    features (B, h * w, C), boxes (B, Q, 4) as x1, y1, x2, y2 in pixels of the map -> (B, Q, 49, C), row by row. A sample more than a
    pixel outside the map is 0, one nearer is moved to its border.

    This is deformable attention of one head, whose points have the weight of a quarter: it runs as such.
    """
    height, width = grid
    steps = (torch.arange(CELLS * SAMPLES, device=boxes.device) + 0.5) / (CELLS * SAMPLES)
    boxes = boxes.float()
    x, y = (boxes[..., i, None] - 0.5 + (boxes[..., i + 2, None] - boxes[..., i, None]) * steps for i in (0, 1))  # (B, Q, 14)
    inside = [(-1 <= at) & (at <= size) for at, size in ((x, width), (y, height))]
    x, y = ((at.clamp(0, size - 1) + 0.5) / size for at, size in ((x, width), (y, height)))
    places = torch.stack([x[:, :, None].expand(-1, -1, CELLS * SAMPLES, -1), y[..., None].expand(-1, -1, -1, CELLS * SAMPLES)], -1)
    weights = (inside[0][:, :, None] & inside[1][..., None]) / SAMPLES**2
    places, weights = _cells(places), _cells(weights[..., None])
    count = boxes.shape[1]
    sums = ms_deform_attn(features[:, :, None], [grid], places[:, :, None, None], weights[:, :, None, None, :, 0])
    return sums.unflatten(1, (count, CELLS**2))


def _cells(samples: Tensor) -> Tensor:
    """(B, Q, 14, 14, K) -> (B, Q * 49, 4, K): the samples of each cell."""
    split = samples.unflatten(3, (CELLS, SAMPLES)).unflatten(2, (CELLS, SAMPLES))
    return split.transpose(3, 4).flatten(4, 5).flatten(1, 3)


class DynamicInteraction(nn.Module):
    """Every query makes two small layers, which its box passes through."""

    def __init__(self, width: int, inner: int = 64) -> None:
        super().__init__()
        self.inner = inner
        self.dynamic_layer = nn.Linear(width, 2 * width * inner)
        self.norm1 = nn.LayerNorm(inner)
        self.norm2 = nn.LayerNorm(width)
        self.out_layer = nn.Linear(width * CELLS**2, width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, queries: Tensor, rois: list[Tensor]) -> list[Tensor]:
        """queries (B, Q, C); of each rois (B, Q, 49, C) -> (B, Q, C)"""
        first, second = self.dynamic_layer(queries).chunk(2, -1)
        first, second = first.unflatten(-1, (-1, self.inner)), second.unflatten(-1, (self.inner, -1))
        return [self._pass(roi, first, second) for roi in rois]

    def _pass(self, roi: Tensor, first: Tensor, second: Tensor) -> Tensor:
        x = self.norm1(roi @ first).relu_()
        x = self.norm2(x @ second).relu_()
        return self.norm3(self.out_layer(x.flatten(2))).relu_()


class QueryRoIFusion(nn.Module):
    """Queries look at each other, then each at the features of its box."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.inst_interact = DynamicInteraction(width)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = FeedForward(width, hidden)

    def forward(self, x: Tensor, rois: list[Tensor]) -> list[Tensor]:
        """x (B, Q, C); of each rois (B, Q, 49, C) -> (B, Q, C). What depends on the queries alone is computed once."""
        x = self.norm1(self.self_attn(x, x, x, residual=x))
        return [self.ffn(self.norm2(x + seen)) for seen in self.inst_interact(x, rois)]
