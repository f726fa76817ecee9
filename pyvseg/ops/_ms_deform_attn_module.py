# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention as modules, with the parameter names and call signatures of published code."""

import math

import torch
from torch import Tensor, nn

from pyvseg.ops.ms_deform_attn import Shapes, ms_deform_attn_fused


class _DeformableAttention(nn.Module):
    """The four linear layers, named and initialised as published, around the fused op."""

    def __init__(self, width: int, heads: int, levels: int, points: int, value_width: int) -> None:
        super().__init__()
        if width % heads or value_width % heads:
            raise ValueError(f"the width must be a multiple of {heads} heads, got {width} (value {value_width})")
        self._grid = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, value_width)
        self.output_proj = nn.Linear(value_width, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Point k of head h starts k + 1 steps out on ray h of a square star, alike on all levels and weighted equally."""
        heads, levels, points = self._grid
        angle = torch.arange(heads) * (2 * math.pi / heads)
        ray = torch.stack((angle.cos(), angle.sin()), -1)
        ray = ray / ray.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, points + 1).view(points, 1)
        self.sampling_offsets.weight.zero_()
        self.sampling_offsets.bias.copy_((ray[:, None, None] * steps).expand(heads, levels, points, 2).flatten())
        self.attention_weights.weight.zero_()
        self.attention_weights.bias.zero_()
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            projection.bias.zero_()

    def attend(self, query: Tensor, points: Tensor, value: Tensor, shapes: Shapes, padding: Tensor | None) -> Tensor:
        """query (B, Q, C), points (B, Q, L, 2 or 4), value (B, S, C), padding (B, S) true where there is nothing."""
        value = self.value_proj(value)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0)
        offsets = self.sampling_offsets(query).unflatten(-1, (*self._grid, 2))
        logits = self.attention_weights(query).unflatten(-1, self._grid)
        heads = value.unflatten(-1, (self._grid[0], -1))
        return self.output_proj(ms_deform_attn_fused(heads, shapes, points, offsets, logits))


class MSDeformAttn(_DeformableAttention):
    """Takes the place of `MSDeformAttn` in Deformable-DETR, Mask2Former and their descendants.

    Same constructor, parameters, initialisation and forward. The module follows autocast: under bfloat16 the linear
    layers and the values are bfloat16, coordinates and sums stay float32.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__(d_model, n_heads, n_levels, n_points, d_model)
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points

    def forward(
        self,
        query: Tensor,  # (B, Q, C)
        reference_points: Tensor,  # (B, Q, L, 2) normalised (x, y), or (B, Q, L, 4) boxes
        input_flatten: Tensor,  # (B, S, C)
        input_spatial_shapes: Shapes,  # L pairs (height, width); ints spare a GPU the wait for a tensor's values
        input_level_start_index: Tensor | None = None,  # not used: it follows from the shapes
        input_padding_mask: Tensor | None = None,  # (B, S) bool, true where padding is
    ) -> Tensor:  # (B, Q, C)
        return self.attend(query, reference_points, input_flatten, input_spatial_shapes, input_padding_mask)


class MultiScaleDeformableAttention(_DeformableAttention):
    """Takes the place of mmcv's module of this name: same constructor, parameters, initialisation and forward.

    `im2col_step`, `norm_cfg` and `init_cfg` are accepted and mean nothing here.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
        value_proj_ratio: float = 1.0,
    ) -> None:
        super().__init__(embed_dims, num_heads, num_levels, num_points, int(embed_dims * value_proj_ratio))
        self.embed_dims, self.num_heads, self.num_levels, self.num_points = embed_dims, num_heads, num_levels, num_points
        self.batch_first = batch_first
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        query: Tensor,  # (Q, B, C), or (B, Q, C) with batch_first; so are value, identity, query_pos and the result
        key: Tensor | None = None,  # not used
        value: Tensor | None = None,  # (S, B, C), default: query
        identity: Tensor | None = None,  # added to the result, default: query
        query_pos: Tensor | None = None,  # added to the query
        key_padding_mask: Tensor | None = None,  # (B, S) bool, true where padding is
        reference_points: Tensor | None = None,  # (B, Q, L, 2) normalised (x, y), or (B, Q, L, 4) boxes
        spatial_shapes: Shapes | None = None,  # L pairs (height, width)
        level_start_index: Tensor | None = None,  # not used: it follows from the shapes
        **ignored: object,  # what mmcv's layers pass to any attention
    ) -> Tensor:
        if reference_points is None or spatial_shapes is None:
            raise ValueError("reference_points and spatial_shapes are needed")
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        out = self.attend(query, reference_points, value, spatial_shapes, key_padding_mask)
        return self.dropout(out if self.batch_first else out.transpose(0, 1)) + identity
