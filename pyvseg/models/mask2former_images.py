# SPDX-License-Identifier: Apache-2.0
"""Mask2Former (Cheng et al., CVPR 2022) on single images: semantic, panoptic and instance results; and what can be made of
videos with its image checkpoints."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyvseg.models.frame_size import FrameSize
from pyvseg.models.image_results import Instances, Segment, best_pairs, inside_and_quality, panoptic, ranked, semantic_labels
from pyvseg.models.mask2former import Mask2Former
from pyvseg.models.minvis import MinVIS
from pyvseg.models.panoptic_frames import FrameByFrame
from pyvseg.models.video_instances import CHUNK_BYTES


class Mask2FormerImages(Mask2Former):
    """All methods take an image uint8 RGB (H, W, 3); full-size logits exist for some queries or rows at a time."""

    @torch.inference_mode()
    def semantic(self, image: np.ndarray) -> np.ndarray:
        """Classes int64 (H, W)."""
        logits, masks, size = self._predict(image)
        return semantic_labels(logits.softmax(-1)[:, :-1], masks, size).cpu().numpy()

    @torch.inference_mode()
    def panoptic(self, image: np.ndarray) -> tuple[np.ndarray, list[Segment]]:
        """Label map int32 (H, W), 0 = nothing, and its segments."""
        logits, masks, size = self._predict(image)
        scores, labels = logits.softmax(-1).max(-1)
        likely = (labels != logits.shape[-1] - 1) & (scores > 0.8)  # the others take no part
        found, segments = panoptic(logits[likely], _full(masks[likely], size), frozenset(self.settings.things or range(self.settings.classes)))
        return found.cpu().numpy(), segments

    @torch.inference_mode()
    def instances(self, image: np.ndarray, top: int = 100) -> Instances:
        """At most `top` detections, tensors; a query is in it once for each class that it is likely to be."""
        logits, masks, size = self._predict(image)
        things = self.settings.things
        pairs = best_pairs(logits, top, None if things is None else frozenset(things))
        queries, which = pairs.queries.unique(return_inverse=True)
        step = max(1, CHUNK_BYTES // (4 * max(size.padded[0] * size.padded[1], size.source[0] * size.source[1])))
        parts = [inside_and_quality(_full(masks[some], size)) for some in queries.split(step)]
        inside, quality = (torch.cat(part) for part in zip(*parts))
        return ranked(pairs, inside[which], quality[which])

    def _predict(self, image: np.ndarray) -> tuple[Tensor, Tensor, FrameSize]:
        """Class logits (Q, K + 1), stride-4 mask logits (Q, h, w), both float32."""
        s = self.settings
        size = FrameSize.of(*image.shape[:2], s.short_side, s.long_side)
        last = self(size.input(image[None], s.mean, s.std, self.device))[-1]
        return last.logits[0].float(), last.masks[0].float(), size


class Mask2FormerInstances(Mask2FormerImages, MinVIS):
    """In a video, objects are followed as MinVIS follows them: its network is this one."""


class Mask2FormerPanoptic(FrameByFrame, Mask2FormerImages):
    """In a video, every frame stands alone."""


def _full(masks: Tensor, size: FrameSize) -> Tensor:
    return size.to_source(size.upsample(masks[None]))[0] if len(masks) else masks.new_empty(0, *size.source)
