# SPDX-License-Identifier: Apache-2.0
"""Panoptic, semantic and instance results of one image (kMaX-DeepLab). A query's mask is a softmax over the queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyvseg.models.image_results import Instances, Segment, top_pairs
from pyvseg.models.kmax_size import KMaXSize
from pyvseg.ops import mask_bands, mask_winners


@dataclass(frozen=True)
class ImagePanopticSettings:
    """pixel     probability above which a pixel is in a query's mask; more than 1/3, so that at most two masks meet in a pixel
    thing, stuff   class score that a segment needs
    overlap        share of its mask that must be free when its turn comes
    class_weight, mask_weight   exponents of the class score and of the mean probability in the order of the segments
    """

    pixel: float = 0.4
    thing: float = 0.7
    stuff: float = 0.5
    overlap: float = 0.8
    class_weight: float = 1.0
    mask_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.pixel > 1 / 3:
            raise ValueError(f"pixel must be more than 1/3, got {self.pixel}")


def panoptic(
    logits: Tensor, masks: Tensor, things: frozenset[int], size: KMaXSize, rules: ImagePanopticSettings
) -> tuple[Tensor, list[Segment]]:
    """logits (N, K + 1), masks (N, h, w) logits at stride 4 -> label map int32 (H, W), 0 = nothing, and its segments."""
    queries = len(logits)
    scores, categories = logits.float().softmax(-1)[:, :-1].max(-1)
    index, probability = (x[:, 0] for x in mask_winners(masks[None], size.rows, size.columns, min(2, queries)))
    index = torch.where(probability > rules.pixel, index.int(), queries)  # a last bin takes what is in no mask
    area = torch.bincount(index.flatten(), minlength=queries + 1)
    total = torch.bincount(index.flatten(), probability.flatten().double(), queries + 1)
    pairs = torch.bincount(index[0].flatten() * (queries + 1) + index[-1].flatten(), minlength=(queries + 1) ** 2)
    pairs = pairs.view(queries + 1, -1)
    meet = (pairs + pairs.T)[:-1, :-1].cpu().numpy()  # pixels that two masks have in common
    quality = (total / area.clamp(min=1))[:-1]
    order = (scores**rules.class_weight * quality**rules.mask_weight).argsort(descending=True, stable=True).tolist()
    number, rank, segments = _accept(order, area.tolist(), meet, scores.tolist(), categories.tolist(), things, rules)
    number, rank = (torch.tensor(x, device=index.device) for x in (number, rank))
    winner = index.gather(0, rank[index.long()].argmin(0, keepdim=True))[0]
    return number[winner.long()].int(), segments


def _accept(
    order: list[int], area: list[int], meet: np.ndarray, scores: list[float], categories: list[int], things: frozenset[int],
    rules: ImagePanopticSettings,
) -> tuple[list[int], list[int], list[Segment]]:  # fmt: skip
    """The label and the rank of each query (of those left out 0 and the last), with those of no query behind."""
    number, rank = [0] * (len(order) + 1), [len(order)] * (len(order) + 1)
    taken, segments, stuff = np.zeros(len(order), bool), [], {}
    for q in order:
        category, is_thing = categories[q], categories[q] in things
        free = area[q] - int(meet[q, taken].sum())
        if scores[q] <= (rules.thing if is_thing else rules.stuff) or free <= rules.overlap * area[q]:
            continue
        taken[q], rank[q] = True, int(taken.sum())
        if category not in stuff:
            segments.append(Segment(len(segments) + 1, is_thing, category))
            number[q] = len(segments)
            if not is_thing:
                stuff[category] = number[q]
        else:
            number[q] = stuff[category]
    return number, rank, segments


def semantic(logits: Tensor, masks: Tensor, size: KMaXSize) -> Tensor:
    """The same -> (K, H, W) class scores."""
    classes = logits.float().softmax(-1)[:, :-1]
    scores = masks.new_empty(classes.shape[1], *size.source)
    for rows, band in mask_bands(masks, size.rows, size.columns):
        scores[:, rows] = torch.einsum("qk,qhw->khw", classes, band.softmax(0))
    return scores


def instances(logits: Tensor, masks: Tensor, size: KMaXSize, things: frozenset[int], top: int = 100, pixel: float = 0.4) -> Instances:
    """The same -> those of the `top` best (query, class) pairs whose class is of `things`."""
    scores, queries, labels = top_pairs(logits.float().softmax(-1)[:, :-1], top)
    kept = torch.tensor([label in things for label in labels.tolist()], dtype=torch.bool, device=labels.device)
    scores, queries, labels = scores[kept], queries[kept], labels[kept]
    inside = torch.empty(len(queries), *size.source, dtype=torch.bool, device=masks.device)
    area, total = torch.zeros(2, len(queries), device=masks.device)
    for rows, band in mask_bands(masks, size.rows, size.columns):
        chosen = band.softmax(0)[queries]
        inside[:, rows] = chosen > pixel
        area += inside[:, rows].flatten(1).sum(1)
        total += (chosen * inside[:, rows]).flatten(1).sum(1)
    scores, order = (scores * total / (area + 1e-6)).sort(descending=True, stable=True)
    return Instances(scores, labels[order], inside[order])
