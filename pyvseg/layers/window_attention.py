# SPDX-License-Identifier: Apache-2.0
"""Attention inside space-time windows of a clip (Video Swin, Liu et al., 2021), in the form of PCVOS' intra-clip refinement.

Queries and keys come from per-frame features that no block changes, so the attention maps of a clip are the same for
every object: they are computed once and applied to the values of all objects together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.packed import Linear
from pyvseg.layers.transfer import made_once

Sizes = tuple[int, int, int]


def effective_window(grid: Sizes, window: Sizes, shift: Sizes) -> tuple[Sizes, Sizes]:
    """On an axis that the window covers whole, the window shrinks to the axis and is not shifted."""
    fits = [g <= w for g, w in zip(grid, window)]
    return (
        tuple(g if f else w for g, w, f in zip(grid, window, fits)),
        tuple(0 if f else s for s, f in zip(shift, fits)),
    )


def partition(x: Tensor, window: Sizes, shift: Sizes) -> Tensor:
    """(B, T, H, W, C), zero-padded at the end and rolled by -shift -> (B, windows, tokens, C)."""
    b, *grid, c = x.shape
    pad = [-g % w for g, w in zip(grid, window)]
    x = F.pad(x, (0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))
    if any(shift):
        x = x.roll([-s for s in shift], (1, 2, 3))
    t, h, w = (s // w for s, w in zip(x.shape[1:4], window))
    x = x.view(b, t, window[0], h, window[1], w, window[2], c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, t * h * w, -1, c)


def merge(windows: Tensor, grid: Sizes, window: Sizes, shift: Sizes) -> Tensor:
    """The inverse of `partition`."""
    b, _, _, c = windows.shape
    t, h, w = (-(-g // w) for g, w in zip(grid, window))
    x = windows.view(b, t, h, w, *window, c).permute(0, 1, 4, 2, 5, 3, 6, 7)
    x = x.reshape(b, t * window[0], h * window[1], w * window[2], c)
    if any(shift):
        x = x.roll(shift, (1, 2, 3))
    return x[:, : grid[0], : grid[1], : grid[2]]


def relative_position_index(window: Sizes) -> Tensor:
    """(N, N) int64 row of the bias table for each (query, key) pair of a window's N tokens."""
    axes = torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij")
    tokens = torch.stack([a.flatten() for a in axes], 1)
    offset = tokens[:, None] - tokens[None] + torch.tensor(window) - 1
    spans = [2 * w - 1 for w in window]
    return (offset[..., 0] * spans[1] + offset[..., 1]) * spans[2] + offset[..., 2]


@made_once(8)
def shift_mask(grid: Sizes, window: Sizes, shift: Sizes, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(windows, N, N): -100 between tokens that the roll brought together from opposite sides of the grid, else 0."""
    padded = [g + -g % w for g, w in zip(grid, window)]
    labels = torch.zeros(1, *padded, 1, device=device)
    region = 0
    cuts = [[slice(0, -w), slice(-w, -s), slice(-s, None)] if s else [slice(None)] for w, s in zip(window, shift)]
    for t in cuts[0]:
        for h in cuts[1]:
            for w in cuts[2]:
                labels[:, t, h, w] = region
                region += 1
    labels = partition(labels, window, (0, 0, 0)).flatten(1).view(-1, window[0] * window[1] * window[2])
    return (labels[:, None] != labels[:, :, None]).to(dtype) * -100.0


class WindowAttention(nn.Module):
    """One head; `shared` projects queries and keys by one matrix."""

    def __init__(self, key_width: int, value_width: int, window: Sizes, shared: bool) -> None:
        super().__init__()
        self.window, self.scale = window, key_width**-0.5
        spans = [2 * w - 1 for w in window]
        self.relative_position_bias_table = nn.Parameter(torch.zeros(spans[0] * spans[1] * spans[2], 1))
        self.qk = nn.Linear(key_width, key_width if shared else 2 * key_width)
        self.v = nn.Linear(value_width, value_width)
        self.proj = nn.Linear(value_width, value_width)
        self.register_buffer("index", relative_position_index(window), persistent=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def attention(self, x: Tensor, grid: Sizes, window: Sizes, shift: Sizes) -> Tensor:
        """Normalised per-frame features (B, T, H, W, C) -> attention maps (B, windows, N, N)."""
        tokens = self.qk(partition(x, window, shift))
        q, k = (tokens, tokens) if self.qk.out_features == x.shape[-1] else tokens.chunk(2, -1)
        logits = (q * self.scale) @ k.transpose(-1, -2)
        n = logits.shape[-1]
        # Published geometry: a smaller window reads the top-left corner of the nominal window's index, even where
        # that is not the offset between the two tokens.
        bias = self.relative_position_bias_table[self.index[:n, :n].reshape(-1), 0].view(n, n)
        logits = logits + bias.to(logits.dtype)
        if any(shift):
            logits = logits + shift_mask(tuple(grid), window, shift, logits.device, logits.dtype)
        return logits.softmax(-1)

    def forward(self, attention: Tensor, values: Tensor) -> Tensor:
        """Attention maps (B, windows, N, N) and values (B, O, windows, N, V) of O objects -> (B, O, windows, N, V)."""
        return self.proj(attention[:, None] @ self.v(values))


class RefinementBlock(nn.Module):
    def __init__(self, key_width: int, value_width: int, window: Sizes, shift: Sizes, shared: bool) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(key_width)
        self.norm1_v = nn.LayerNorm(value_width)
        self.attn = WindowAttention(key_width, value_width, window, shared)
        self.norm2 = nn.LayerNorm(value_width)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(value_width, 4 * value_width), "fc2": nn.Linear(4 * value_width, value_width)}
        )

    def attention(self, x: Tensor) -> Tensor:
        """Frame features (B, T, H, W, C) -> attention maps (B, windows, N, N), the same for every object."""
        grid = x.shape[1:4]
        return self.attn.attention(self.norm1(x), grid, *effective_window(grid, self.window, self.shift))

    def forward(self, values: Tensor, attention: Tensor) -> Tensor:
        """Object values (B, O, T, H, W, V) and the clip's attention maps -> new values of the same shape."""
        b, o, *grid, _ = values.shape
        window, shift = effective_window(grid, self.window, self.shift)
        windows = partition(self.norm1_v(values).flatten(0, 1), window, shift)
        windows = self.attn(attention, windows.unflatten(0, (b, o)))
        values = values + merge(windows.flatten(0, 1), grid, window, shift).unflatten(0, (b, o))
        return values + self.mlp.fc2(_gelu(self.mlp.fc1, self.norm2(values)))


def _gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """In the same pass where the layer can."""
    return linear(x, gelu=True) if isinstance(linear, Linear) else F.gelu(linear(x))


class IntraClipRefinement(nn.Module):
    """Two window-attention blocks over a clip's readouts, the second shifted by half a window (PCVOS).

    key_width, value_width   channels of the frame features and of the readouts
    window                   (frames, rows, columns)
    shared                   one projection for queries and keys, as in the published checkpoint

    `attention` turns features (B, T, H, W, key_width) into the clip's maps; forward applies them to readouts
    (B, O, T, H, W, value_width) of any of its objects and returns the refined readouts.
    """

    def __init__(self, key_width: int, value_width: int, window: Sizes, *, shared: bool) -> None:
        super().__init__()
        shifts = ((0, 0, 0), tuple(w // 2 for w in window))
        self.blocks = nn.ModuleList(RefinementBlock(key_width, value_width, window, s, shared) for s in shifts)
        self.norm = nn.LayerNorm(value_width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def attention(self, x: Tensor) -> list[Tensor]:
        return [block.attention(x) for block in self.blocks]

    def forward(self, values: Tensor, attention: list[Tensor]) -> Tensor:
        for block, maps in zip(self.blocks, attention):
            values = block(values, maps)
        return self.norm(values)
