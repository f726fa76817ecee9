# SPDX-License-Identifier: Apache-2.0
"""Video instance segmentation: AP and AR of tracks as the YouTube-VIS evaluation defines them (YouTube-VIS 2019 to 2022, OVIS).

COCO's procedure (Lin et al. 2014) with tubes in place of masks (Yang et al., ICCV 2019): the IoU of two tracks is that of their
masks in all frames together, and the area of a track is the mean of its masks'. All is counted per video and category.

Masks stay run lengths: the overlap with a tube is the difference of its running area at the ends of the runs. To paint the
pixels, were it as bits for `pyvseg.ops.mask_iou`, takes far longer than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # IoU
RECALLS = np.linspace(0, 1, 101)
LIMITS = (1, 10, 100)  # tracks per video and category, best first
AREAS = {"all": (0, 1e10), "small": (0, 128**2), "medium": (128**2, 256**2), "large": (256**2, 1e10)}  # pixels, both ends belong
COLUMNS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "AR1", "AR10", "AR100", "AR small", "AR medium", "AR large")
_RANGES = np.array(list(AREAS.values()), float)
_TINY = np.spacing(1)


class Tubes(NamedTuple):
    """The masks of N tracks of a video as runs of set pixels, counted through all frames one after the other."""

    starts: np.ndarray  # (R,) int64, ascending within a track
    stops: np.ndarray  # (R,) int64
    first: np.ndarray  # (N + 1,) int64: track n has the runs first[n] to first[n + 1]


class Tracks(NamedTuple):
    """N tracks of a video. Annotations have no scores, results no crowds."""

    categories: np.ndarray  # (N,) int64
    scores: np.ndarray  # (N,) float64
    crowd: np.ndarray  # (N,) bool
    areas: np.ndarray  # (N,) float64, pixels: the mean of the masks that are not empty
    tubes: Tubes


class Matches(NamedTuple):
    """One video and category: D tracks of the result, best first, for A area ranges and T thresholds."""

    scores: np.ndarray  # (D,)
    hit: np.ndarray  # (A, T, D) bool
    ignored: np.ndarray  # (A, T, D) bool
    annotated: np.ndarray  # (A,) int64, tracks to be found


class Averages(NamedTuple):
    """-1 where there is nothing to find."""

    precision: np.ndarray  # (T, R, K, A, M): thresholds, recalls, categories, area ranges, limits
    recall: np.ndarray  # (T, K, A, M)


def tube_overlap(a: Tubes, b: Tubes) -> np.ndarray:
    """Pixels that each tube of a shares with each of b, (N, M) int64."""
    shared = np.zeros((len(a.first) - 1, len(b.first) - 1), np.int64)
    ends = np.stack((a.starts, a.stops), 1).ravel()
    for m in range(shared.shape[1]):
        runs = slice(b.first[m], b.first[m + 1])
        edges = np.stack((b.starts[runs], b.stops[runs]), 1).ravel()
        if edges.size and ends.size:
            area = np.cumsum(np.diff(edges, prepend=0) * (np.arange(edges.size) % 2))
            inside = np.interp(ends, edges, area)  # slopes 0 and 1: exact in float64
            shared[:, m] = _by_track(inside[1::2] - inside[::2], a.first)
    return shared


def tube_areas(tubes: Tubes) -> np.ndarray:
    """Pixels of each tube, (N,) int64."""
    return _by_track(tubes.stops - tubes.starts, tubes.first)


def _by_track(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    sums = np.concatenate(([0], np.cumsum(values)))
    return (sums[first[1:]] - sums[first[:-1]]).astype(np.int64)


def match_video(truth: Tracks, result: Tracks) -> dict[int, Matches]:
    """By category, for those that the video's annotation or result has."""
    shared = tube_overlap(result.tubes, truth.tubes)
    union = tube_areas(result.tubes)[:, None] + tube_areas(truth.tubes) - shared
    iou = shared / np.maximum(union, 1)  # two empty tubes: 0
    found = {}
    for category in np.union1d(truth.categories, result.categories).tolist():
        t, r = (np.flatnonzero(tracks.categories == category) for tracks in (truth, result))
        r = r[np.argsort(-result.scores[r], kind="stable")][: LIMITS[-1]]
        found[category] = _match(result.scores[r], result.areas[r], iou[np.ix_(r, t)], truth.areas[t], truth.crowd[t])
    return found


def _match(scores: np.ndarray, areas: np.ndarray, iou: np.ndarray, truth_areas: np.ndarray, crowd: np.ndarray) -> Matches:
    """Each track, best first, takes the annotated one of largest IoU that is free; one that need not be found only where no other is."""
    D, G = iou.shape
    A, T = len(_RANGES), len(THRESHOLDS)
    ignore = crowd | _outside(truth_areas)  # (A, G)
    hit, ignored = np.zeros((2, A, T, D), bool)
    free = np.ones((A, T, G), bool)
    least = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    for d in range(D if G else 0):
        fits = (free | crowd) & (iou[d] >= least)
        real = fits & ~ignore[:, None]
        candidates = np.where(real.any(-1, keepdims=True), real, fits)
        chosen = G - 1 - np.where(candidates, iou[d], -1)[..., ::-1].argmax(-1)  # of equals the last
        hit[..., d] = candidates.any(-1)
        ignored[..., d] = hit[..., d] & np.take_along_axis(ignore, chosen, 1)
        a, t = np.nonzero(hit[..., d])
        free[a, t, chosen[a, t]] = False
    ignored |= ~hit & _outside(areas)[:, None]
    return Matches(scores, hit, ignored, (~ignore).sum(1))


def _outside(areas: np.ndarray) -> np.ndarray:
    """Which areas (N,) lie outside each range, (A, N) bool."""
    return (areas < _RANGES[:, :1]) | (areas > _RANGES[:, 1:])


def average(videos: Iterable[dict[int, Matches]], categories: Sequence[int]) -> Averages:
    """Precision and recall of all videos, given in the order of their ids, by category."""
    T, R, K, A, M = len(THRESHOLDS), len(RECALLS), len(categories), len(AREAS), len(LIMITS)
    precision, recall = -np.ones((T, R, K, A, M)), -np.ones((T, K, A, M))
    by_category: dict[int, list[Matches]] = {category: [] for category in categories}
    for video in videos:
        for category, matches in video.items():
            by_category[category].append(matches)
    for k, matches in enumerate(by_category.values()):
        annotated = sum((each.annotated for each in matches), np.zeros(A, np.int64))
        for m, limit in enumerate(LIMITS):
            for a in np.flatnonzero(annotated):
                precision[:, :, k, a, m], recall[:, k, a, m] = _curves(matches, a, limit, annotated[a])
    return Averages(precision, recall)


def _curves(matches: list[Matches], a: int, limit: int, annotated: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision at each recall (T, R) and the largest recall (T,) of one category and area range."""
    scores = np.concatenate([each.scores[:limit] for each in matches])
    order = np.argsort(-scores, kind="stable")
    hit, ignored = (np.concatenate([each[i][a, :, :limit] for each in matches], 1)[:, order] for i in (1, 2))
    right, wrong = (np.cumsum(of & ~ignored, 1) for of in (hit, ~hit))
    recalls, precisions = right / annotated, right / (right + wrong + _TINY)
    precisions = np.maximum.accumulate(precisions[:, ::-1], 1)[:, ::-1]
    at = [np.searchsorted(row, RECALLS, side="left") for row in recalls]
    beyond = np.pad(precisions, ((0, 0), (0, 1)))  # 0 where the recall is not reached
    return np.stack([row[i] for row, i in zip(beyond, at)]), recalls[:, -1] if len(scores) else np.zeros(len(THRESHOLDS))


def summary(averages: Averages) -> dict[str, float]:
    """The twelve numbers of `COLUMNS` as fractions; NaN where there is nothing to find."""
    precision, recall = averages
    of_area = [precision[..., a, -1] for a in range(len(AREAS))]
    values = [of_area[0], of_area[0][0], of_area[0][5], *of_area[1:]]
    values += [*(recall[:, :, 0, m] for m in range(len(LIMITS))), *(recall[:, :, a, -1] for a in range(1, len(AREAS)))]
    return {name: _mean(value) for name, value in zip(COLUMNS, values)}


def _mean(values: np.ndarray) -> float:
    there = values[values > -1]
    return float(there.mean()) if there.size else float("nan")
