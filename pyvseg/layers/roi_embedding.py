# SPDX-License-Identifier: Apache-2.0
"""What a thing is recognised by, of the features in its box: the track head of quasi-dense tracking (Pang et al., CVPR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvseg.layers.fpn import ConvGN
from pyvseg.layers.roi import CELLS, roi_align

FINEST = 56  # pixels: smaller boxes are looked up in the map of stride 4, from twice that on in the next one, and so on


def pyramid_roi_align(maps: list[Tensor], boxes: Tensor, stride: int = 4) -> Tensor:
    """Maps (1, C, h_i, w_i), each of half the size before it, boxes (N, 4) as x1, y1, x2, y2 in pixels of the image ->
    (N, C, 7, 7), of each box from the map that suits its size."""
    boxes = boxes.float()
    sides = boxes[:, 2:] - boxes[:, :2]
    levels = ((sides.prod(1).sqrt() / FINEST + 1e-6).log2().floor()).clamp(0, len(maps) - 1)
    found = torch.zeros(len(boxes), CELLS**2, maps[0].shape[1], dtype=maps[0].dtype, device=boxes.device)
    for level, features in enumerate(maps):
        rows = (levels == level).nonzero()[:, 0]
        if len(rows):
            pixels = features.permute(0, 2, 3, 1).flatten(1, 2)
            cells = roi_align(pixels, tuple(features.shape[2:]), boxes[rows][None] / (stride << level))[0]
            found = found.index_copy(0, rows, cells.to(found.dtype))
    return found.unflatten(1, (CELLS, CELLS)).permute(0, 3, 1, 2)


class RoIEmbedding(nn.Module):
    """channels of the maps; width and number of the convolutions; width of the hidden layer and of the embedding."""

    def __init__(self, channels: int = 256, width: int = 256, convs: int = 4, hidden: int = 1024, embedding: int = 256) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(ConvGN(width if i else channels, width, 3) for i in range(convs)))
        self.layers = nn.ModuleList([nn.Linear(width * CELLS**2, hidden)])
        self.out = nn.Linear(hidden, embedding)

    def forward(self, rois: Tensor) -> Tensor:
        """(N, C, 7, 7) -> (N, E)"""
        x = self.convs(rois).flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.out(x)
