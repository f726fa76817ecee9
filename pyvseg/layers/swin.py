# SPDX-License-Identifier: Apache-2.0
"""Swin Transformer trunks (Liu et al., ICCV 2021) as dense prediction uses them: any image size, a norm on every output."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.packed import Linear
from pyvseg.layers.window_attention import merge, partition, relative_position_index, shift_mask


class WindowSelfAttention(nn.Module):
    """Attention among the tokens of a window, with a learned bias for every offset between two tokens."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("index", relative_position_index((1, window, window)), persistent=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Windows (B, W, N, C), mask (W, N, N) added to every head's logits -> (B, W, N, C)."""
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)[None]  # (1, heads, N, N)
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(x), 1, 1, 1)  # (B * W, heads, N, N)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).flatten(0, 1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).flatten(2)).unflatten(0, x.shape[:2])


class SwinMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, residual: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        return residual + drop(self.fc2(F.gelu(self.fc1(x))))

    def for_inference(self) -> nn.Module:
        return _FastSwinMLP(self)


class _FastSwinMLP(nn.Module):
    """`SwinMLP` with GELU and addition inside its linear layers; nothing is dropped."""

    def __init__(self, mlp: SwinMLP) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(mlp.fc1), Linear(mlp.fc2)

    def forward(self, x: Tensor, residual: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        return self.fc2(self.fc1(x, gelu=True), residual=residual)


class SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.window, self.shift, self.drop_path = (1, window, window), (0, shift, shift), drop_path
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowSelfAttention(width, heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = SwinMLP(width, mlp_ratio * width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, H, W, C), mask (windows, N, N) for shifted blocks."""
        grid = (1, *x.shape[1:3])
        windows = partition(self.norm1(x)[:, None], self.window, self.shift)
        windows = self.attn(windows, mask if self.shift[1] else None)
        x = x + self._drop(merge(windows, grid, self.window, self.shift)[:, 0])
        return self.mlp(self.norm2(x), x, self._drop)

    def _drop(self, branch: Tensor) -> Tensor:
        """Stochastic depth: in training whole images skip the branch."""
        if not self.training or not self.drop_path:
            return branch
        keep = torch.rand(len(branch), 1, 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1 - self.drop_path)


class PatchMerging(nn.Module):
    """Two by two tokens become one of twice the channels; odd sides are filled up with zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 C)"""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        return self.reduction(self.norm(torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)))


class SwinStage(nn.Module):
    def __init__(self, width: int, heads: int, window: int, mlp_ratio: int, drop_paths: list[float], last: bool) -> None:
        super().__init__()
        self.window = window
        shifts = [window // 2 if i % 2 else 0 for i in range(len(drop_paths))]
        self.blocks = nn.ModuleList(SwinBlock(width, heads, window, s, mlp_ratio, d) for s, d in zip(shifts, drop_paths))
        self.downsample = None if last else PatchMerging(width)

    def forward(self, x: Tensor) -> Tensor:
        window, shift = (1, self.window, self.window), (0, self.window // 2, self.window // 2)
        mask = shift_mask((1, *x.shape[1:3]), window, shift, x.device, x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return x


class Swin(nn.Module):
    """The trunk of a Swin Transformer.

    width, depths, heads, window, mlp_ratio   as published: Swin-T is 96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 4
    drop_path                                 stochastic depth of the last block in training; it grows linearly from 0
    first                                     the first stage that has an output

    forward takes (B, 3, H, W) and returns one map (B, width * 2**i, H/2**(i+2), W/2**(i+2)) per stage i, sizes rounded up.
    """

    def __init__(
        self, width: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int, mlp_ratio: int = 4, drop_path: float = 0.3, first: int = 0
    ) -> None:
        super().__init__()
        widths, self.first = tuple(width * 2**i for i in range(len(depths))), first
        self.channels = widths[first:]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 4, 4), "norm": nn.LayerNorm(width)})
        drops = [drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        starts = [sum(depths[:i]) for i in range(len(depths))]
        self.layers = nn.ModuleList(
            SwinStage(c, h, window, mlp_ratio, drops[start : start + depth], i == len(depths) - 1)
            for i, (c, h, start, depth) in enumerate(zip(widths, heads, starts, depths))
        )
        for i, c in enumerate(self.channels, first):
            setattr(self, f"norm{i}", nn.LayerNorm(c))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.pad(x, (0, -x.shape[-1] % 4, 0, -x.shape[-2] % 4))
        x = self.patch_embed.norm(self.patch_embed.proj(x).permute(0, 2, 3, 1))
        maps = []
        for i, stage in enumerate(self.layers):
            x = stage(x)
            if i >= self.first:
                maps.append(getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2))
            x = x if stage.downsample is None else stage.downsample(x)
        return maps
