# SPDX-License-Identifier: Apache-2.0
"""TransVOD++ (Zhou et al., TPAMI 2023): TransVOD whose queries first look at the features of their boxes."""

from __future__ import annotations

from torch import Tensor

from pyvseg.layers.deformable_detr import Detections, moved
from pyvseg.layers.roi import QueryRoIFusion, roi_align
from pyvseg.layers.transfer import constant
from pyvseg.models.transvod import Frames, TransVOD, TransVODSettings
from pyvseg.models.video_detector import MINED, Encoded, to_corners

ROI_SCALE = 1 / 32  # published: of a map at stride 8 only its upper left sixteenth is seen


class TransVODPlusPlus(TransVOD):
    """The network of one variant; see `TransVODSettings`."""

    DECODERS = len(MINED)

    def __init__(self, settings: TransVODSettings) -> None:
        super().__init__(settings)
        self.fusion = QueryRoIFusion(settings.hidden, settings.heads, settings.ffn)

    def encode(self, images: Tensor) -> Encoded:
        found = self.detections(images)
        rois = [self.roi_features(part, found, images.shape[-2:]) for part in (found.memory, found.memory + found.position)]
        current, reference = self.fusion(found.queries, rois)
        scores = self.detector.class_embed[-1](found.queries).float().sigmoid()
        return Encoded(Frames(found.memory, found.boxes, current, reference, scores), found.grid)

    def rois(self, found: Detections, size: tuple[int, int]) -> Tensor:
        """(B, Q, 4) as x1, y1, x2, y2 in pixels of the network's input of `size` (height, width). As published the last box head takes
        its step for a second time."""
        boxes = moved(found.boxes, self.detector.bbox_embed[-1](found.queries))
        height, width = size
        return to_corners(boxes) * constant((width, height, width, height), boxes.device)

    def roi_features(self, pixels: Tensor, found: Detections, size: tuple[int, int]) -> Tensor:
        """(B, Q, 49, C) of pixels (B, h * w, C)"""
        return roi_align(pixels, found.grid, self.rois(found, size) * ROI_SCALE).to(pixels.dtype)
