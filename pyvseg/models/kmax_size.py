# SPDX-License-Identifier: Apache-2.0
"""Where a frame's pixels lie in the input of kMaX-DeepLab, and the way back from the masks at stride 4."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from pyvseg.models.frame_size import FrameSize, Size
from pyvseg.ops import Resampling


class KMaXSize(FrameSize):
    """`padded` is the size that the network is built for, whatever the frame's: 32 k + 1 on each side."""

    @classmethod
    def fit(cls, source: Size, padded: Size) -> KMaXSize:
        """As large as fits (Video-kMaX)."""
        scale = min(p / s for s, p in zip(source, padded))
        return cls(tuple(source), tuple(max(1, int(np.round(s * scale))) for s in source), tuple(padded))

    @property
    def shown(self) -> Size:
        """The part of the padded masks that is the frame."""
        return self.resized

    @cached_property
    def rows(self) -> Resampling:
        return self._resampling(0)

    @cached_property
    def columns(self) -> Resampling:
        return self._resampling(1)

    @property
    def cells(self) -> Size:
        """Of a map at stride 4."""
        return tuple(-(-p // 4) for p in self.padded)

    def _resampling(self, axis: int) -> Resampling:
        """Up to the padded size, cut, and to the source's size: two bilinear steps as published, in one."""
        align = bool(self.padded[1] % 2)  # published: the width decides for both axes
        up = Resampling.bilinear(self.cells[axis], self.padded[axis], align)
        return up.cut(self.shown[axis]).then(Resampling.bilinear(self.shown[axis], self.source[axis], align))


class KMaXImageSize(KMaXSize):
    """kMaX-DeepLab's own, for single images."""

    @classmethod
    def fit(cls, source: Size, padded: Size) -> KMaXImageSize:
        """The longer side becomes the shortest side of the input."""
        return cls(tuple(source), FrameSize.of(*source, min(padded), min(padded)).resized, tuple(padded))

    @property
    def shown(self) -> Size:
        """As published: by the longest sides, whatever the image was resized to. It may be a pixel more than that."""
        scale = max(self.padded) / max(self.source)
        return tuple(min(round(s * scale), p) for s, p in zip(self.source, self.padded))
