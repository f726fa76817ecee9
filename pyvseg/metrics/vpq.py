# SPDX-License-Identifier: Apache-2.0
"""Video panoptic quality (Kim et al., CVPR 2020) as the VIPSeg evaluation computes it.

For a window length n every run of n frames of a video counts as one image whose segments are tubes. A result's tube matches an
annotated one of its class where their IoU, void left out, exceeds one half. VPQ is the mean over the window lengths.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from pyvseg.errors import PyvsegError
from pyvseg.metrics.panoptic import Frame, Segments, merge_pairs, position

WINDOWS = (1, 2, 4, 6)  # frames; the VIPSeg repository's own script adds 8
IOU, TP, FP, FN = range(4)  # columns of counts


class Quality(NamedTuple):
    """Per class (K,) float64, NaN for a class that occurs nowhere."""

    pq: np.ndarray
    sq: np.ndarray
    rq: np.ndarray


class VideoPQ:
    """Counts one video, frame by frame; memory holds the last frames' pairs, not their pixels.

    counts (len(windows), num_classes, 4) float64: sum of IoU, TP, FP, FN. Those of several videos add up.
    """

    def __init__(self, num_classes: int, windows: Sequence[int] = WINDOWS) -> None:
        self.windows = tuple(windows)
        self.counts = np.zeros((len(self.windows), num_classes, 4))
        self._recent: deque[Frame] = deque(maxlen=max(self.windows))

    def update(self, frame: Frame) -> None:
        """Raises PyvsegError where the areas that the annotation states do not fit its pixels."""
        self._recent.append(frame)
        for counts, n in zip(self.counts, self.windows):
            if n <= len(self._recent):
                counts += window_counts(list(islice(self._recent, len(self._recent) - n, None)), len(counts))


def window_counts(frames: Sequence[Frame], num_classes: int) -> np.ndarray:
    """Sum of IoU, TP, FP, FN per class, (num_classes, 4) float64, of `frames` as one image."""
    pairs, truth_lists, result_lists = zip(*frames)
    pairs, truth, result = merge_pairs(pairs), _tubes(truth_lists), _tubes(result_lists)
    t, r = position(pairs.truth, truth.ids), position(pairs.result, result.ids)

    def in_results(where: np.ndarray) -> np.ndarray:
        """Pixels of each of the result's tubes in the pairs that `where` selects."""
        return np.bincount(r[where], pairs.pixels[where], len(result.ids))

    void = in_results((r >= 0) & (pairs.truth == 0))
    both = np.flatnonzero((t >= 0) & (r >= 0))
    same = both[~truth.crowd[t[both]] & (truth.classes[t[both]] == result.classes[r[both]])]
    ct, cr, inside = t[same], r[same], pairs.pixels[same]
    union = truth.areas[ct] + result.areas[cr] - inside - void[cr]
    if (wrong := inside > union).any():
        raise PyvsegError(f'segment {truth.ids[ct[wrong]][0]} covers more pixels than its "area" in the annotation; make the annotation\'s JSON again')
    iou = inside / union
    hit = iou > 0.5
    ct, cr, iou = ct[hit], cr[hit], iou[hit]

    forgiving = np.full(num_classes, -1)  # the crowd of each class that excuses false positives: the last listed one
    crowds = np.flatnonzero(truth.crowd)[np.argsort(truth.first[truth.crowd])]
    forgiving[truth.classes[crowds]] = crowds
    excused = void + in_results(both[forgiving[result.classes[r[both]]] == t[both]])
    spurious = ~(excused / np.maximum(result.areas, 1) > 0.5)
    spurious[cr] = False
    missed = ~truth.crowd
    missed[ct] = False
    hits = truth.classes[ct]
    columns = ((hits, iou), (hits, None), (result.classes[spurious], None), (truth.classes[missed], None))
    return np.stack([np.bincount(classes, weights, num_classes) for classes, weights in columns], 1)


class _Tubes(NamedTuple):
    """Segments of several frames, by ascending id."""

    ids: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    first: np.ndarray  # place in the frames' lists one after the other


def _tubes(lists: Sequence[Segments]) -> _Tubes:
    """Areas are summed; class and crowd are those of the first frame that lists the id."""
    ids, classes, crowd, areas = map(np.concatenate, zip(*lists))
    table, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    return _Tubes(table, classes[first], crowd[first], np.bincount(inverse, areas, len(table)).astype(np.int64), first)


def quality(counts: np.ndarray) -> Quality:
    """Of counts (K, 4)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        wrong = counts[:, FP] / 2 + counts[:, FN] / 2
        pq, rq = counts[:, IOU] / (counts[:, TP] + wrong), counts[:, TP] / (counts[:, TP] + wrong)
        sq = np.where(counts[:, TP] > 0, counts[:, IOU] / counts[:, TP], np.where(np.isnan(pq), np.nan, 0.0))
    return Quality(pq, sq, rq)


def means(counts: np.ndarray, things: Sequence[int]) -> dict[str, dict[str, float]]:
    """{"all" | "things" | "stuff": {"pq", "sq", "rq", "classes"}} of counts (K, 4): plain means over the classes that occur, NaN where none does."""
    per_class = quality(counts)
    is_thing = np.isin(np.arange(len(counts)), things)
    groups = {"all": np.ones(len(counts), bool), "things": is_thing, "stuff": ~is_thing}
    return {name: _mean(per_class, group & ~np.isnan(per_class.pq)) for name, group in groups.items()}


def _mean(per_class: Quality, where: np.ndarray) -> dict[str, float]:
    values = {name: float(column[where].mean()) if where.any() else float("nan") for name, column in per_class._asdict().items()}
    return values | {"classes": int(where.sum())}


def totals(counts: np.ndarray, things: Sequence[int]) -> dict[str, float]:
    """VPQ, things and stuff in percent of counts (windows, K, 4) over all videos: the mean over the window lengths."""
    rows = [means(of_window, things) for of_window in counts]
    return {name: 100 * float(np.mean([row[name]["pq"] for row in rows])) for name in ("all", "things", "stuff")}
