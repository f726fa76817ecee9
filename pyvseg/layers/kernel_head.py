# SPDX-License-Identifier: Apache-2.0
"""One stage of K-Net's iterative kernel update, with the kernel linking of Video K-Net; published parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.ops import KernelUpdator, kernel_update


class Attention(nn.Module):
    """Multi-head attention with the query added."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, query: Tensor, key: Tensor | None = None) -> Tensor:  # (B, N, C), (B, M, C)
        key = query if key is None else key
        return query + self.attn(query, key, key, need_weights=False)[0]


class FeedForward(nn.Module):
    """Two linears with the input added."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(channels, width), nn.ReLU()), nn.Linear(width, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Conv1x1(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def _branch(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU())


class KernelHead(nn.Module):
    """Pools features in the masks, updates the kernels, lets them attend to one another, predicts classes and new masks.

    `link=True` adds the attention to the previous frame's kernels, whose result is for tracking only.
    """

    def __init__(self, channels: int = 256, heads: int = 8, ffn: int = 2048, classes: int = 19, link: bool = False) -> None:
        super().__init__()
        self.feat_transform = Conv1x1(channels)
        self.kernel_update_conv = KernelUpdator(channels)
        self.attention, self.attention_norm = Attention(channels, heads), nn.LayerNorm(channels)
        self.ffn, self.ffn_norm = FeedForward(channels, ffn), nn.LayerNorm(channels)
        self.cls_fcs, self.fc_cls = _branch(channels), nn.Linear(channels, classes)
        self.mask_fcs, self.fc_mask = _branch(channels), nn.Linear(channels, channels)
        if link:
            # Eight heads whatever `heads` is, as published.
            self.attention_previous, self.attention_previous_norm = Attention(channels, 8), nn.LayerNorm(channels)
            self.link_ffn, self.link_ffn_norm = FeedForward(channels, ffn), nn.LayerNorm(channels)

    def forward(
        self,
        features: Tensor,  # (B, C, h, w)
        kernels: Tensor,  # (B, N, C)
        mask_logits: Tensor,  # (B, N, H, W); resized where they differ from the features' size
        previous_kernels: Tensor | None = None,  # (B, M, C) of the frame before
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # class logits (B, N, classes), mask logits (B, N, h, w), kernels, linked kernels (B, N, C)
        features = self.feat_transform(features)
        if mask_logits.shape[2:] != features.shape[2:]:
            mask_logits = F.interpolate(mask_logits, size=features.shape[2:], mode="bilinear", align_corners=False)
        kernels = kernel_update(mask_logits, features, kernels, self.kernel_update_conv)
        kernels = self.attention_norm(self.attention(kernels))
        kernels = self.ffn_norm(self.ffn(kernels))
        classes = self.fc_cls(self.cls_fcs(kernels))
        masks = torch.einsum("bnc,bchw->bnhw", self.fc_mask(self.mask_fcs(kernels)), features)
        return classes, masks, kernels, self.link(kernels, previous_kernels)

    def link(self, kernels: Tensor, previous: Tensor | None) -> Tensor:
        """(B, N, C) kernels that know those of the frame before; in the first frame as they are."""
        if previous is None:
            return kernels
        linked = self.attention_previous_norm(self.attention_previous(kernels, previous))
        return self.link_ffn_norm(self.link_ffn(linked))
