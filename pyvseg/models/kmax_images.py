# SPDX-License-Identifier: Apache-2.0
"""kMaX-DeepLab (Yu et al., ECCV 2022) on single images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pyvseg.models.image_results import Segment
from pyvseg.models.kmax import KMaX, KMaXSettings
from pyvseg.models.kmax_image_results import ImagePanopticSettings, panoptic
from pyvseg.models.kmax_size import KMaXImageSize
from pyvseg.models.panoptic_frames import FrameByFrame


@dataclass(frozen=True)
class KMaXImageSettings(KMaXSettings):
    panoptic: ImagePanopticSettings = ImagePanopticSettings()


class KMaXImages(FrameByFrame, KMaX):
    @torch.inference_mode()
    def panoptic(self, image: np.ndarray) -> tuple[np.ndarray, list[Segment]]:
        """uint8 RGB (H, W, 3) -> label map int32 (H, W), 0 = nothing, and its segments."""
        s = self.settings
        size = KMaXImageSize.fit(image.shape[:2], s.image_size)
        prediction, _ = self(size.input(image[None], s.mean, s.std, self.device))
        labels, segments = panoptic(prediction.logits[0], prediction.masks(0)[0], frozenset(s.things), size, s.panoptic)
        return labels.cpu().numpy(), segments
