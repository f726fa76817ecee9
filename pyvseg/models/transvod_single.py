# SPDX-License-Identifier: Apache-2.0
"""The detectors of single frames that the TransVOD systems are built on: Deformable DETR (Zhu et al., ICLR 2021) for ImageNet VID."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from pyvseg.models.video_detector import DetectionState, Encoded, FrameDetections, Prediction, VideoDetector


class Frames(NamedTuple):
    """What is kept of B frames: all that `Prediction` is made of."""

    logits: Tensor
    boxes: Tensor


class TransVODSingle(VideoDetector):
    """The network of one variant; see `DetectorSettings`. Every frame stands alone."""

    keep = Frames

    def encode(self, images: Tensor) -> Encoded:
        found = self.detections(images)
        return Encoded(Frames(self.detector.class_embed[-1](found.queries), found.boxes), found.grid)

    def forward(self, images: Tensor) -> list[Prediction]:
        """Normalised images (B, 3, H, W) -> their objects."""
        return [Prediction(*self.encode(images).frames)]

    def finish(self, state: DetectionState) -> Iterator[tuple[int, FrameDetections]]:
        for t in range(state.frames):
            logits, boxes = self.kept(state, t, *Frames._fields)
            yield t, self.results(Prediction(logits[None], boxes[None]), state.size.source)[0]
