# SPDX-License-Identifier: Apache-2.0
"""Where a frame's pixels lie in the input of the detectron2 family: resized to a shorter side, padded right and below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg.layers.transfer import constant, to_device
from pyvseg.ops import Resampling, mask_bands
from pyvseg.video.resize import resize_bilinear

Size = tuple[int, int]
BAND_BYTES = 16 << 20  # of full-size logits at a time


@dataclass(frozen=True)
class FrameSize:
    """Sizes (height, width): of the video, of the resized frame, and of the network's input, a multiple of 32 that is padded to."""

    source: Size
    resized: Size
    padded: Size

    @classmethod
    def of(cls, height: int, width: int, short_side: int | None, long_side: int = 1333, multiple: int = 32) -> FrameSize:
        """The shorter side becomes `short_side` unless the longer one would pass `long_side`; None leaves the frame as it is."""
        resized = (height, width)
        if short_side is not None:
            scale = short_side / min(resized)
            sides = [short_side if s == min(resized) else scale * s for s in resized]
            if max(sides) > long_side:
                shrink = long_side / max(sides)
                sides = [s * shrink for s in sides]
            resized = tuple(max(1, int(s + 0.5)) for s in sides)
        return cls((height, width), resized, tuple(s + -s % multiple for s in resized))

    def input(self, images: Sequence[np.ndarray] | np.ndarray, mean: tuple, std: tuple, device: torch.device | str = "cpu") -> Tensor:
        """T images, uint8 RGB (H, W, 3) -> normalised, padded network input (T, 3, h, w), float32, channels last in memory."""
        device = torch.device(device)
        x = self.resize(to_device(images, device))
        x = (x - constant(tuple(mean), device).view(3, 1, 1)) / constant(tuple(std), device).view(3, 1, 1)
        padding = (0, self.padded[1] - self.resized[1], 0, self.padded[0] - self.resized[0])
        return F.pad(x, padding).contiguous(memory_format=torch.channels_last)

    def resize(self, images: Tensor) -> Tensor:
        """uint8 (T, H, W, 3) -> float32 (T, 3, *resized)."""
        if self.resized != self.source:
            images = resize_bilinear(images, self.resized)
        return images.permute(0, 3, 1, 2).float()

    def upsample(self, logits: Tensor) -> Tensor:
        """Stride-4 mask logits (N, T, h, w) -> logits over the resized frame (N, T, *resized): up to the padded size, then cut."""
        logits = F.interpolate(logits.float(), self.padded, mode="bilinear", align_corners=False)
        return logits[..., : self.resized[0], : self.resized[1]]

    def to_source(self, logits: Tensor) -> Tensor:
        """Logits over the resized frame -> over the video's own frame. Two resizings as published: one alone differs at borders."""
        if self.resized == self.source:
            return logits
        return F.interpolate(logits, self.source, mode="bilinear", align_corners=False)

    def bands(self, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """`upsample` and `to_source` of stride-4 logits (N, h, w), some rows at a time: float32 (N, R, W)."""
        if self.resized != self.source:
            yield from mask_bands(logits, *self.to_full(logits.shape[-2:]))
            return
        cells, (height, width) = logits.shape[1], self.source
        step = max(1, BAND_BYTES // (16 * max(len(logits), 1) * self.padded[1]))
        for first in range(0, -(-height // 4), step):
            top, bottom = max(first - 1, 0), min(first + step + 1, cells)  # a row of cells more on each side
            size = (4 * (bottom - top), self.padded[1])
            full = F.interpolate(logits[None, :, top:bottom].float(), size, mode="bilinear", align_corners=False)[0]
            rows = slice(4 * first, min(4 * (first + step), height))
            yield rows, full[:, rows.start - 4 * top : rows.stop - 4 * top, :width]

    def to_full(self, cells: Size) -> tuple[Resampling, Resampling]:
        """`upsample` and `to_source` along rows and along columns, for `mask_bands`; `cells` are those of the stride-4 logits."""
        sizes = zip(cells, self.padded, self.resized, self.source)
        return tuple(
            Resampling.bilinear(cell, padded, False).cut(resized).then(Resampling.bilinear(resized, source, False))
            for cell, padded, resized, source in sizes
        )


class FloatFrameSize(FrameSize):
    """Frames are resized as mmdetection does where it loads them as float: bilinear, neither antialiased nor rounded."""

    def resize(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float()
        return x if self.resized == self.source else F.interpolate(x, self.resized, mode="bilinear", align_corners=False)
