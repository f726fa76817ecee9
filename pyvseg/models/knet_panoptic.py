# SPDX-License-Identifier: Apache-2.0
"""Panoptic results of a frame (K-Net): every pixel goes to the kernel whose score times mask is largest there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import find_objects
from torch import Tensor

from pyvseg.models.frame_size import FrameSize
from pyvseg.ops import Resampling, mask_winners

_APART = 4096.0  # shares times this have the same order, and `mask_winners` leaves out whole tiles of those that are far below others
BLOCK = 4  # cells of a mask that are judged together
NOWHERE = (-1.0, -1.0, 10.0, 10.0)  # the published box of a thing without pixels


@dataclass(frozen=True)
class MergeSettings:
    """top       pairs of kernel and class of things that take part
    score     of a thing at least
    overlap   share of the pixels inside its mask that a segment must win"""

    top: int = 100
    score: float = 0.25
    overlap: float = 0.6


@dataclass(frozen=True)
class Segment:
    """One segment of a frame.

    category   class of the model, from 0
    kernel     and its rank among the pairs of kernels and classes of things, -1 for stuff
    area       pixels
    """

    category: int
    is_thing: bool
    score: float
    kernel: int
    rank: int
    area: int


@dataclass(frozen=True)
class FramePanoptic:
    """labels (H, W) int16: 0 void, else 1 + the number of the segment; segments by falling score; boxes (things, 4) float32 of
    things by x1, y1, x2, y2, first and last pixel."""

    labels: np.ndarray
    segments: list[Segment]
    boxes: np.ndarray


def merge(scores: Tensor, masks: Tensor, semantic: Tensor | None, size: FrameSize, stuff: int, upsample: int, rules: MergeSettings) -> FramePanoptic:
    """Of one frame.

    scores     (N, K) of the classes; the last `stuff` kernels and classes are of stuff, one for each other
    masks      (N, h, w) logits at stride 8, which become probabilities at `upsample` times that size
    semantic   (K, h, w) logits: boxes see only pixels of things in these; None: all pixels
    """
    found = _candidates(scores.float().cpu(), stuff, rules)
    # A kernel that comes again with another class comes with a lower score, and wins nowhere.
    first = {segment.kernel: segment for segment in reversed(found)}
    chosen = [segment for segment in found if first[segment.kernel] is segment]
    logits = masks[[segment.kernel for segment in chosen]].float()
    chosen, rows = _contenders(chosen, logits)
    logits = logits[rows]
    shares = _shares(logits, upsample)
    axes = [Resampling.bilinear(cells, padded, False).cut(shown) for cells, padded, shown in zip(shares.shape[1:], size.padded, size.source)]
    weights = torch.tensor([_APART * segment.score for segment in chosen], device=shares.device)
    winners = mask_winners(shares.mul_(weights[:, None, None])[None], *axes).index[0, 0]
    area = torch.bincount(winners.flatten(), minlength=len(chosen)).tolist()
    eligible = [i for i, segment in enumerate(chosen) if area[i] and not (segment.is_thing and segment.score < rules.score)]
    inside = dict(zip(eligible, _inside(logits[eligible], size, upsample)))
    kept = [i for i in eligible if inside[i] and area[i] / inside[i] >= rules.overlap]
    kept.sort(key=lambda i: -chosen[i].score)
    table = torch.zeros(len(chosen), dtype=torch.int16)
    table[kept] = torch.arange(1, len(kept) + 1, dtype=torch.int16)
    labels = table.to(winners.device)[winners.int()].cpu().numpy()
    segments = [Segment(c.category, c.is_thing, c.score, c.kernel, c.rank, area[i]) for i, c in ((i, chosen[i]) for i in kept)]
    return FramePanoptic(labels, segments, _boxes(labels, segments, semantic, size, scores.shape[1] - stuff))


def _candidates(scores: Tensor, stuff: int, rules: MergeSettings) -> list[Segment]:
    """The best pairs of kernel and class of things, then stuff, both by falling score."""
    kernels, things = len(scores), scores.shape[1] - stuff
    best, pairs = scores[: kernels - stuff, :things].flatten().topk(min(rules.top, (kernels - stuff) * things))
    found = [
        Segment(pair % things, True, score, pair // things, rank, 0) for rank, (score, pair) in enumerate(zip(best.tolist(), pairs.tolist()))
    ]
    own, order = scores[kernels - stuff :, things:].diagonal().sort(descending=True, stable=True)
    return found + [Segment(things + j, False, score, kernels - stuff + j, -1, 0) for score, j in zip(own.tolist(), order.tolist())]


def _contenders(chosen: list[Segment], logits: Tensor) -> tuple[list[Segment], list[int]]:
    """Those of (N, h, w) that may win a pixel somewhere: of most kernels others are larger everywhere. What a block's pixels can
    be lies between the cells in it and around it."""
    weights = torch.tensor([segment.score for segment in chosen], device=logits.device)[:, None, None]
    shares = logits.sigmoid().mul_(weights)
    least = _blocks(shares.neg()).amin(0).neg_()
    rows = (_blocks(shares) * (1 + 1e-5) >= least).flatten(1).any(1).nonzero()[:, 0].tolist()
    rows = rows or [0]  # NaN is larger than nothing
    return [chosen[row] for row in rows], rows


def _blocks(maps: Tensor) -> Tensor:
    """The largest value in and around every block of (N, h, w); sizes are multiples of a block's, as frames are padded to 32 pixels."""
    return F.max_pool2d(maps, BLOCK + 2, BLOCK, 1)


def _shares(logits: Tensor, upsample: int) -> Tensor:
    """(N, h, w) logits -> (N, upsample * h, upsample * w) probabilities."""
    return F.interpolate(logits[None], scale_factor=upsample, mode="bilinear", align_corners=False)[0].sigmoid_()


def _inside(logits: Tensor, size: FrameSize, upsample: int) -> list[int]:
    """Pixels of each mask (M, h, w), where it is at least one half at the frame's size. Only the blocks' box of those is made."""
    if not len(logits):
        return []
    counts, scale, near = [], size.padded[0] // logits.shape[1], _blocks(logits) >= 0
    for mask, lines in zip(logits, zip(near.any(2).cpu().numpy(), near.any(1).cpu().numpy())):
        parts, pixels = [], []
        for line, shown in zip(map(np.flatnonzero, lines), size.source):
            first, end = (BLOCK * line[0], BLOCK * line[-1] + BLOCK) if len(line) else (0, 0)
            start = max(first - 1, 0)  # a cell more on each side, for the interpolation
            parts.append(slice(start, end + 1))
            pixels.append(slice((first - start) * scale, min(end * scale, shown) - start * scale))
        full = F.interpolate(_shares(mask[None, *parts], upsample)[None], scale_factor=scale // upsample, mode="bilinear", align_corners=False)
        counts.append((full[0, 0][tuple(pixels)] >= 0.5).sum())
    return torch.stack(counts).tolist()


def _boxes(labels: np.ndarray, segments: list[Segment], semantic: Tensor | None, size: FrameSize, things: int) -> np.ndarray:
    """As published the semantic map is stretched: to the frame's size with its padding."""
    numbers = [i for i, segment in enumerate(segments, 1) if segment.is_thing]
    if not numbers:
        return np.zeros((0, 4), np.float32)
    allowed = labels
    if semantic is not None:
        axes = [Resampling.bilinear(cells, source, False) for cells, source in zip(semantic.shape[1:], size.source)]
        allowed = labels * (mask_winners(_APART * semantic[None].float().contiguous(), *axes).index[0, 0] < things).cpu().numpy()
    found = find_objects(allowed, len(segments))
    boxes = [
        NOWHERE if (part := found[i - 1]) is None else (part[1].start, part[0].start, part[1].stop - 1, part[0].stop - 1) for i in numbers
    ]
    return np.array(boxes, np.float32)
