# SPDX-License-Identifier: Apache-2.0
"""Axial attention with relative positions (Wang et al., Axial-DeepLab, ECCV 2020) as kMaX-DeepLab uses it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvseg.layers.normed import BATCH_NORM, LinearBN
from pyvseg.layers.packed import Linear
from pyvseg.ops import axial_attention

REACH = 254  # the tables know relative positions up to this distance
HEADS = 8


class AxialAttention(nn.Module):
    """Attention along the columns, then along the rows of (B, C, H, W) -> (B, value, H, W); key, value: total depths."""

    def __init__(self, inputs: int, key: int, value: int) -> None:
        super().__init__()
        self.height_axis = AxisAttention(inputs, key, value)
        self.width_axis = AxisAttention(value, key, value)

    def forward(self, x: Tensor) -> Tensor:
        x = self.height_axis(x.permute(0, 2, 3, 1), 1)
        return self.width_axis(x, 2).permute(0, 3, 1, 2)


class AxisAttention(nn.Module):
    """Self-attention within the columns (axis 1) or rows (axis 2) of (B, H, W, C) -> (B, H, W, value).

    The similarity of query l and key m is the sum of three batch-normed products: q.k, and of either with a learned vector for
    the distance m - l; nothing is divided by the square root of the depth. What is read is the values and, likewise, learned
    vectors for the distance, again batch-normed each.
    """

    def __init__(self, inputs: int, key: int, value: int) -> None:
        super().__init__()
        self.depths = key, key, value
        self.qkv = LinearBN(inputs, sum(self.depths))
        self.query_rpe, self.key_rpe, self.value_rpe = (nn.Parameter(torch.randn(2 * REACH + 1, d // HEADS)) for d in self.depths)
        self.similarity_norm = nn.BatchNorm2d(3 * HEADS, **BATCH_NORM)
        self.output_norm = nn.BatchNorm1d(2 * value, **BATCH_NORM)

    def forward(self, x: Tensor, axis: int) -> Tensor:
        return self._within_rows(x) if axis == 2 else self._within_rows(x.transpose(1, 2)).transpose(1, 2)

    def _within_rows(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in self.qkv(x).split(self.depths, -1))  # (B, S, L, heads, depth)
        distance = distances(x.shape[2], x.device)
        products = [
            torch.einsum("bslhd,bsmhd->bshlm", q, k),
            torch.einsum("bslhd,lmd->bshlm", q, self.query_rpe[distance]),
            torch.einsum("bsmhd,lmd->bshlm", k, self.key_rpe[distance]),
        ]
        similarity = self.similarity_norm(torch.cat(products, 2).flatten(0, 1)).unflatten(1, (3, HEADS)).sum(1)
        weight = similarity.float().softmax(-1).to(x.dtype).unflatten(0, x.shape[:2])
        content = torch.einsum("bshlm,bsmhd->bslhd", weight, v)
        position = torch.einsum("bshlm,lmd->bslhd", weight, self.value_rpe[distance])
        both = torch.cat([content, position], 3).flatten(3)
        return self.output_norm(both.flatten(0, 2)).view_as(both).unflatten(-1, (2, -1)).sum(-2)

    def for_inference(self) -> nn.Module:
        return _FastAxisAttention(self)


class _FastAxisAttention(nn.Module):
    """`AxisAttention` with its norms folded into the projection and into the scales of `axial_attention`.

    The shift of the similarity norm is the same for all keys, so softmax does not see it. Weights sum to 1, so the shift of
    the output norm goes into the values.
    """

    def __init__(self, attention: AxisAttention) -> None:
        super().__init__()
        key, _, value = attention.depths
        self.query_rpe, self.key_rpe, self.value_rpe = attention.query_rpe, attention.key_rpe, attention.value_rpe
        (similarity, _), (output, shift) = _affine(attention.similarity_norm), _affine(attention.output_norm)
        qkv = attention.qkv.conv
        rows = torch.cat([similarity.new_ones(2 * key), output[:value]])
        qkv.weight, bias = nn.Parameter(qkv.weight * rows[:, None], requires_grad=False), qkv.bias * rows
        bias[2 * key :] += shift.unflatten(0, (2, -1)).sum(0)
        qkv.bias = nn.Parameter(bias, requires_grad=False)
        self.qkv = Linear(qkv)
        self.register_buffer("scales", similarity.view(3, HEADS))
        self.register_buffer("value_scale", output[value:].view(HEADS, -1))

    def forward(self, x: Tensor, axis: int) -> Tensor:
        return axial_attention(self.qkv(x), self.query_rpe, self.key_rpe, self.value_rpe, self.scales, self.value_scale, axis)


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation mode."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def distances(length: int, device: torch.device) -> Tensor:
    """(L, L): the row of the tables for query l and key m."""
    position = torch.arange(length, device=device)
    return position - position[:, None] + REACH
