# SPDX-License-Identifier: Apache-2.0
"""One stage of K-Net's iterative kernel update (Zhang et al., NeurIPS 2021), with what Video K-Net (Li et al., CVPR 2022) adds:
kernels that know those of the frame before."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.attention import Attention, FeedForward
from pyvseg.layers.kernel_init import mask_logits
from pyvseg.ops import KernelUpdator, mask_pool

Way = Literal["attention", "update"]


class KernelLink(nn.Module):
    """Kernels attend to those of the frame before; by "update" these first take up what lies in the masks of this frame."""

    HEADS = 8  # whatever the stage has, as published

    def __init__(self, channels: int, ffn: int, way: Way) -> None:
        super().__init__()
        self.update = KernelUpdator(channels) if way == "update" else None
        self.attention, self.norm = Attention(channels, self.HEADS), nn.LayerNorm(channels)
        self.ffn = FeedForward(channels, ffn)

    def forward(self, kernels: Tensor, previous: Tensor, pooled: Tensor) -> Tensor:
        """kernels (B, N, C), previous (B, M, C), pooled (B, N, C) features; by "update" M is N -> (B, N, C)"""
        previous = previous if self.update is None else self.update(pooled, previous)
        return self.ffn(self.norm(self.attention(kernels, previous, previous, residual=kernels)))


class Refined(NamedTuple):
    """classes (B, N, K) logits or None, masks (B, N, h, w) logits, kernels (B, N, C), linked (B, N, C): the kernels, for tracking."""

    classes: Tensor | None
    masks: Tensor
    kernels: Tensor
    linked: Tensor


class KernelHead(nn.Module):
    """Pools features in the masks, updates the kernels, lets them attend to one another, predicts classes and new masks.

    classes   0: none are predicted
    link      how kernels for tracking come to know those of the frame before
    fuse      how the kernels themselves do
    """

    def __init__(
        self, channels: int = 256, heads: int = 8, ffn: int = 2048, classes: int = 19, link: Way | None = None, fuse: Way | None = None
    ) -> None:
        super().__init__()
        self.feat_transform = nn.Conv2d(channels, channels, 1)
        self.update = KernelUpdator(channels)
        self.attention, self.norm = Attention(channels, heads), nn.LayerNorm(channels)
        self.ffn = FeedForward(channels, ffn)
        self.cls_fcs, self.fc_cls = (_branch(channels), nn.Linear(channels, classes)) if classes else (None, None)
        self.mask_fcs, self.fc_mask = _branch(channels), nn.Linear(channels, channels)
        self.link, self.fuse = (KernelLink(channels, ffn, way) if way else None for way in (link, fuse))
        if classes:
            nn.init.constant_(self.fc_cls.bias, -math.log(99))

    def forward(
        self,
        features: Tensor,  # (B, C, h, w)
        kernels: Tensor,  # (B, N, C)
        masks: Tensor,  # (B, N, H, W) logits; resized where they differ from the features' size
        previous: Tensor | None = None,  # (B, M, C) kernels of the frame before
    ) -> Refined:
        features = self.feat_transform(features)
        pooled = self.pool(masks, features)
        if previous is not None and self.fuse is not None:
            kernels = self.fuse(kernels, previous, pooled)
        kernels = self.refine(pooled, kernels)
        linked = kernels if previous is None or self.link is None else self.link(kernels, previous, pooled)
        return Refined(self.classify(kernels), self.masks(kernels, features), kernels, linked)

    def pool(self, masks: Tensor, features: Tensor) -> Tensor:
        """Of transformed features; sums (B, N, C)."""
        if masks.shape[2:] != features.shape[2:]:
            masks = F.interpolate(masks, features.shape[2:], mode="bilinear", align_corners=False)
        return mask_pool(masks, features)

    def refine(self, pooled: Tensor, kernels: Tensor) -> Tensor:
        kernels = self.update(pooled, kernels)
        return self.ffn(self.norm(self.attention(kernels, kernels, kernels, residual=kernels)))

    def classify(self, kernels: Tensor) -> Tensor | None:
        return None if self.fc_cls is None else self.fc_cls(self.cls_fcs(kernels))

    def masks(self, kernels: Tensor, features: Tensor) -> Tensor:
        """Of transformed features."""
        return mask_logits(self.fc_mask(self.mask_fcs(kernels)), features)


def _branch(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU())
