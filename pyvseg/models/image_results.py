# SPDX-License-Identifier: Apache-2.0
"""Classes and masks of queries -> semantic, panoptic and instance results of one image (Mask2Former)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyvseg.models.frame_size import FrameSize


class Segment(NamedTuple):
    """One entry of a panoptic result."""

    id: int  # its value in the label map
    is_thing: bool
    category: int


class Instances(NamedTuple):
    """N detections, best first."""

    scores: Tensor  # (N,) class probability times mean mask probability
    labels: Tensor  # (N,) int64
    masks: Tensor  # (N, H, W) bool


def semantic(logits: Tensor, masks: Tensor) -> Tensor:
    """logits (Q, K + 1), masks (Q, H, W) logits -> (K, H, W) class scores; their argmax is the label map."""
    return torch.einsum("qk,qhw->khw", logits.softmax(-1)[:, :-1], masks.sigmoid())


def semantic_labels(probabilities: Tensor, masks: Tensor, size: FrameSize) -> Tensor:
    """The same for probabilities (Q, K) and stride-4 masks (Q, h, w): the label map int64 (H, W), some rows at a time."""
    bands = (torch.einsum("qk,qhw->khw", probabilities, band.sigmoid()) for _, band in size.bands(masks))
    return torch.cat([band.max(0).indices for band in bands])


def panoptic(
    logits: Tensor, masks: Tensor, things: frozenset[int], *, object_threshold: float = 0.8, overlap_threshold: float = 0.8
) -> tuple[Tensor, list[Segment]]:
    """logits (Q, K + 1), masks (Q, H, W) logits -> label map int32 (H, W), 0 = nothing, and its segments.

    things              classes whose objects count singly; all segments of another class are one
    object_threshold    queries of a lower score do not take part
    overlap_threshold   a segment must win this share of its own mask
    """
    scores, labels = logits.softmax(-1).max(-1)
    kept = (labels != logits.shape[-1] - 1) & (scores > object_threshold)
    result = torch.zeros(masks.shape[1:], dtype=torch.int32, device=masks.device)
    segments: list[Segment] = []
    if not kept.any():
        return result, segments
    probabilities = masks[kept].sigmoid()
    winner = (scores[kept, None, None] * probabilities).argmax(0)
    stuff: dict[int, int] = {}
    for i, category in enumerate(labels[kept].tolist()):
        won, inside = winner == i, probabilities[i] >= 0.5
        area, original = int(won.sum()), int(inside.sum())
        final = won & inside
        if not (area and original and final.any()) or area / original < overlap_threshold:
            continue
        if category in stuff:
            result[final] = stuff[category]
            continue
        segments.append(Segment(len(segments) + 1, category in things, category))
        result[final] = len(segments)
        if category not in things:
            stuff[category] = len(segments)
    return result, segments


def instances(logits: Tensor, masks: Tensor, top: int = 100, things: frozenset[int] | None = None) -> Instances:
    """logits (Q, K + 1), masks (Q, H, W) logits -> the `top` best (query, class) pairs; only those of `things`, where given."""
    pairs = best_pairs(logits, top, things)
    return ranked(pairs, *inside_and_quality(masks[pairs.queries]))


class Pairs(NamedTuple):
    """N queries with one of their classes each, the likeliest first."""

    scores: Tensor
    queries: Tensor
    labels: Tensor


def best_pairs(logits: Tensor, top: int, things: frozenset[int] | None = None) -> Pairs:
    scores, queries, labels = top_pairs(logits.softmax(-1)[:, :-1], top)
    kept = torch.tensor([things is None or label in things for label in labels.tolist()], dtype=torch.bool, device=labels.device)
    return Pairs(scores[kept], queries[kept], labels[kept])


def inside_and_quality(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Mask logits (N, H, W) -> the masks, bool, and the mean probability (N,) inside of each."""
    inside = masks > 0
    return inside, (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)


def ranked(pairs: Pairs, inside: Tensor, quality: Tensor) -> Instances:
    scores, order = (pairs.scores * quality).sort(descending=True, stable=True)
    return Instances(scores, pairs.labels[order], inside[order])


def top_pairs(probabilities: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, K) -> the `top` largest entries, descending, their rows and their columns; a row may occur more than once."""
    scores, index = probabilities.flatten().topk(min(top, probabilities.numel()))
    classes = probabilities.shape[1]
    return scores, index // classes, index % classes
