# SPDX-License-Identifier: Apache-2.0
"""Where K-Net's kernels begin: learnt ones find first masks, and take up what is inside them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyvseg.layers.fpn import ConvGN, SemanticFPN
from pyvseg.layers.packed import products
from pyvseg.ops import mask_pool


class KernelFrames(NamedTuple):
    """B frames between two stages of K-Net. Kernels of things come first, then one for each class of stuff: N = P + S.

    features   (B, C, h, w) at stride 8
    kernels    (B, N, C)
    masks      (B, N, h, w) logits of what the kernels found last
    semantic   (B, K, h, w) logits of all classes
    """

    features: Tensor
    kernels: Tensor
    masks: Tensor
    semantic: Tensor


class KernelInit(nn.Module):
    """kernels: of things; stuff: classes whose kernels are those of the semantic segmentation, the last ones."""

    def __init__(self, channels: int, kernels: int, classes: int, stuff: int) -> None:
        super().__init__()
        self.stuff = stuff
        self.fpn = SemanticFPN(channels)
        self.loc, self.seg = ConvGN(channels, channels), ConvGN(channels, channels)
        self.kernels = nn.Conv2d(channels, kernels, 1, bias=False)
        self.classes = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.kernels.weight)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.constant_(self.classes.bias, -math.log(99))

    def forward(self, maps: list[Tensor]) -> KernelFrames:
        """Maps (B, C, ., .) of a feature pyramid at strides 4 to 32."""
        return self.begin(*self.fpn(maps))

    def begin(self, localization: Tensor, semantic: Tensor) -> KernelFrames:
        """From the branches of the pyramid's sum."""
        localization, semantic = self.loc(localization), self.seg(semantic)
        kernels, classes = (conv.weight.flatten(1)[None].expand(len(localization), -1, -1) for conv in (self.kernels, self.classes))
        masks = mask_logits(kernels, localization)
        logits = mask_logits(classes, semantic) + self.classes.bias[:, None, None]
        features = localization + semantic
        kernels = kernels + mask_pool(masks, features).to(kernels.dtype)
        if self.stuff:
            masks = torch.cat([masks, logits[:, -self.stuff :]], 1)
            kernels = torch.cat([kernels, classes[:, -self.stuff :]], 1)
        return KernelFrames(features, kernels, masks, logits)


def mask_logits(kernels: Tensor, features: Tensor) -> Tensor:
    """(B, N, C), (B, C, h, w) -> (B, N, h, w)"""
    return products(kernels, features.flatten(2)).unflatten(2, features.shape[2:])
