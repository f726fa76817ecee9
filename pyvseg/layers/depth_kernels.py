# SPDX-License-Identifier: Apache-2.0
"""K-Net's kernels with a second stream beside them (PolyphonicFormer, Yuan et al., ECCV 2022): of each kernel that finds a mask one
more, that says how far away what lies in it is."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.attention import Attention, FeedForward
from pyvseg.layers.fpn import ConvGN, SemanticFPN
from pyvseg.layers.kernel_head import KernelHead
from pyvseg.layers.kernel_init import KernelInit, mask_logits
from pyvseg.ops import KernelUpdator, mask_pool


class DepthFrames(NamedTuple):
    """`KernelFrames`, and of depth: features (B, C, h, w), kernels (B, N, C), and logits (B, 1, h, w) of the frame as a whole."""

    features: Tensor
    kernels: Tensor
    masks: Tensor
    semantic: Tensor
    depth_features: Tensor
    depth_kernels: Tensor
    dense: Tensor


class DepthKernelInit(KernelInit):
    """All kernels of depth begin as the one that sees the frame as a whole."""

    def __init__(self, channels: int, kernels: int, classes: int, stuff: int) -> None:
        super().__init__(channels, kernels, classes, stuff)
        self.fpn = SemanticFPN(channels, depth=True)
        self.depth, self.direct = ConvGN(channels, channels), nn.Conv2d(channels, 1, 1)
        nn.init.normal_(self.direct.weight, std=0.01)

    def forward(self, maps: list[Tensor]) -> DepthFrames:
        localization, semantic, depth = self.fpn(maps)
        frames, depth = self.begin(localization, semantic), self.depth(depth)
        kernel = self.direct.weight.flatten(1).expand(len(depth), -1, -1)
        dense = mask_logits(kernel, depth) + self.direct.bias[:, None, None]
        return DepthFrames(*frames, depth, kernel.expand_as(frames.kernels), dense)


class DepthRefined(NamedTuple):
    """classes (B, N, K) logits, masks (B, N, h, w) logits, kernels and depth_kernels (B, N, C)."""

    classes: Tensor
    masks: Tensor
    kernels: Tensor
    depth_kernels: Tensor


class DepthKernelHead(KernelHead):
    """A stage. Kernels of depth take up features of depth in the same masks, and know their mask's kernel, not the other way round."""

    def __init__(self, channels: int = 256, heads: int = 8, ffn: int = 2048, classes: int = 19) -> None:
        super().__init__(channels, heads, ffn, classes)
        self.feat_depth_transform = nn.Conv2d(channels, channels, 1)
        self.update_depth = KernelUpdator(channels)
        self.attention_depth, self.norm_depth = Attention(channels, heads), nn.LayerNorm(channels)
        self.ffn_depth = FeedForward(channels, ffn)
        self.depth_regs = nn.Sequential(nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels))
        self.fc_depth = nn.Linear(channels, channels)

    def forward(self, frames: DepthFrames) -> DepthRefined:
        classes, masks, kernels, _ = super().forward(frames.features, frames.kernels, frames.masks)
        pooled = self.pool_depth(frames.masks, frames.depth_features)
        depth = self.update_depth(pooled, frames.depth_kernels + frames.kernels.detach())
        depth = self.ffn_depth(self.norm_depth(self.attention_depth(depth, depth, depth, residual=depth)))
        return DepthRefined(classes, masks, kernels, depth)

    def pool_depth(self, masks: Tensor, features: Tensor) -> Tensor:
        """Of features as they are: they are transformed when they are summed, which is the same, and a hundredth of the pixels."""
        weight, bias = self._transform
        pooled, area = mask_pool(masks, features), (masks > 0).sum((2, 3))
        return F.linear(pooled, weight.to(pooled.dtype)) + area[..., None] * bias.to(pooled.dtype)

    def depth(self, depth_kernels: Tensor, features: Tensor) -> Tensor:
        """(B, N, C) of this stage, features as they are -> logits (B, N, h, w). Kernels are transformed in place of the features."""
        weight, bias = self._transform
        kernels = self.fc_depth(self.depth_regs(depth_kernels))
        return mask_logits(kernels @ weight, features) + (kernels @ bias)[..., None, None]

    @property
    def _transform(self) -> tuple[Tensor, Tensor]:
        return self.feat_depth_transform.weight.flatten(1), self.feat_depth_transform.bias


def metres(logits: Tensor, nearest: float, farthest: float) -> Tensor:
    return logits.float().sigmoid() * (farthest - nearest) + nearest
