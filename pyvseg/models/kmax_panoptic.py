# SPDX-License-Identifier: Apache-2.0
"""Panoptic results of a clip (Video-kMaX): every pixel goes to the query that leads there, if it is sure enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import find_objects

from pyvseg.layers.kmax_predictor import Prediction
from pyvseg.models.kmax_size import KMaXSize
from pyvseg.ops import mask_winners


@dataclass(frozen=True)
class PanopticSettings:
    """object_threshold   queries of no higher class score do not take part
    pixel_threshold    pixels whose query is no surer stay void"""

    object_threshold: float = 0.3
    pixel_threshold: float = 0.5


@dataclass(frozen=True)
class ClipSegment:
    """One segment of a clip.

    feature   float32 (C,): what it is recognised by
    box       float32 (4,): x1, y1, x2, y2 over all frames, in units of the frame's size; None where no pixel is left of it
    """

    category: int
    is_thing: bool
    score: float
    feature: np.ndarray
    box: np.ndarray | None


@dataclass(frozen=True)
class ClipPanoptic:
    """labels (T, H, W), uint8 or int16: 0 void, else 1 + the number of the segment."""

    labels: np.ndarray
    segments: list[ClipSegment]


@torch.inference_mode()
def panoptic_clip(prediction: Prediction, clip: int, things: frozenset[int], size: KMaXSize, rules: PanopticSettings) -> ClipPanoptic:
    """Of clip number `clip` of a prediction. Segments stand in the order of their queries; stuff of one class is one segment."""
    probabilities = prediction.logits[clip].float().softmax(-1)[:, :-1]
    scores, categories = probabilities.max(-1)
    kept = (scores > rules.object_threshold).nonzero()[:, 0]
    # With no query kept all are equal, and the first wins without being sure of a single pixel.
    chosen = kept if len(kept) else kept.new_zeros(1)
    winners = [mask_winners(prediction.masks(t, chosen)[clip : clip + 1], size.rows, size.columns) for t in range(len(prediction.pixels))]
    index, probability = (torch.cat(parts, 1)[0] for parts in zip(*winners))
    sure = probability > rules.pixel_threshold if len(kept) else torch.zeros_like(index, dtype=torch.bool)
    leads = torch.bincount(index.flatten(), minlength=len(chosen)).cpu()
    number, members = _numbers(categories[chosen].tolist(), leads.tolist(), things)
    table = torch.tensor(number, dtype=torch.uint8 if len(members) < 256 else torch.int16, device=index.device)
    labels = (table[index.int()] * sure).cpu().numpy()
    begins = chosen[members]
    features, scores, categories = (x[begins].float().cpu().numpy() for x in (prediction.embeddings[clip], scores, categories))
    segments = [
        ClipSegment(int(category), int(category) in things, float(score), feature, box)
        for category, score, feature, box in zip(categories, scores, features, boxes_of(labels, len(members)))
    ]
    return ClipPanoptic(labels, segments)


def _numbers(categories: list[int], leads: list[int], things: frozenset[int]) -> tuple[list[int], list[int]]:
    """The segment number of each query, 0 where it leads nowhere, and the query that begins each segment."""
    number, members, stuff = [0] * len(categories), [], {}
    for q, category in enumerate(categories):
        if not leads[q]:
            continue
        if category not in stuff:
            members.append(q)
            number[q] = len(members)
            if category not in things:
                stuff[category] = number[q]
        else:
            number[q] = stuff[category]
    return number, members


def boxes_of(labels: np.ndarray, count: int) -> list[np.ndarray | None]:
    """The box of each segment over all frames, from its first to its last pixel."""
    _, height, width = labels.shape
    unit = np.array([width, height, width, height], np.float32)
    return [
        None if found is None else np.array([found[2].start, found[1].start, found[2].stop - 1, found[1].stop - 1], np.float32) / unit
        for found in find_objects(labels, count)
    ]
