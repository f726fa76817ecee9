# SPDX-License-Identifier: Apache-2.0
"""Depth-aware video panoptic segmentation: DVPQ (ViP-DeepLab, CVPR 2021), DSTQ (BMTT challenge 2021) and errors of depth, as published.

Depths are float32 (H, W) in metres, 0 in an annotation where none was measured. Panoptic maps are class * 10000 + instance, the
void of annotations is class 255, that of results the first number beyond the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pyvseg.errors import PyvsegError
from pyvseg.metrics import stq, vpq
from pyvseg.metrics.panoptic import Pairs, count_pairs, frame_of_labels, same_size

DIVISOR = 10000
VOID = 255  # class
WINDOWS = (1, 2, 3, 4)  # frames
THRESHOLDS = (float("inf"), 0.5, 0.25, 0.1)  # relative errors of depth
RATIOS = (1.25, 1.1)  # of DSTQ
ERRORS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "a1", "a2", "a3")
_EPSILON = 1e-15


class Depth(NamedTuple):
    """Pixels of a sequence with measured depth, and of these the ones right within each ratio; those of several sequences add up."""

    right: np.ndarray  # (ratios,) int64
    measured: int


class VideoDVPQ:
    """Counts one sequence: VPQ for which a pixel of wrong depth is no result. Memory is that of `vpq.VideoPQ`.

    counts (thresholds, windows, num_classes, 4) float64: sum of IoU, TP, FP, FN.
    """

    def __init__(self, num_classes: int, windows: Sequence[int] = WINDOWS, thresholds: Sequence[float] = THRESHOLDS) -> None:
        self.num_classes, self.thresholds = num_classes, tuple(thresholds)
        self._videos = [vpq.VideoPQ(num_classes + 1, windows) for _ in self.thresholds]  # and void, which is a class of results here

    def update(self, truth: np.ndarray, result: np.ndarray, truth_depth: np.ndarray, result_depth: np.ndarray) -> None:
        """Panoptic maps int (H, W) and depths float32 (H, W). Raises PyvsegError for sizes, classes or instances that do not fit."""
        same_size(truth, result)
        error = relative_error(truth_depth, result_depth, truth.shape)
        for video, threshold in zip(self._videos, self.thresholds):
            kept = np.where(error > np.float32(threshold), self.num_classes * DIVISOR, result)
            video.update(frame_of_labels(count_ids(truth, kept), self.num_classes + 1, ()))

    @property
    def counts(self) -> np.ndarray:
        return np.stack([video.counts[:, : self.num_classes] for video in self._videos])


class SequenceDSTQ:
    """Counts one sequence: STQ where something is annotated, and the pixels of right depth."""

    def __init__(self, num_classes: int, things: Sequence[int], ratios: Sequence[float] = RATIOS) -> None:
        self.num_classes, self.ratios = num_classes, tuple(ratios)
        self._stq = stq.SequenceSTQ(num_classes, things)
        self._right, self._measured = np.zeros(len(self.ratios), np.int64), 0

    def update(self, truth: np.ndarray, result: np.ndarray, truth_depth: np.ndarray, result_depth: np.ndarray) -> None:
        """As of `VideoDVPQ`."""
        pairs = count_ids(truth, result)
        annotated = pairs.truth >> stq.BITS != VOID
        truth_labels, result_labels, pixels = (column[annotated] for column in pairs)
        void = result_labels >> stq.BITS == self.num_classes
        self._stq.update(Pairs(truth_labels, np.where(void, stq.VOID, result_labels), pixels))
        measured = _measured(truth_depth, result_depth, truth.shape)
        expected, got = truth_depth[measured], result_depth[measured]
        worse = _ratio(expected, got)
        self._right += [int((worse <= ratio).sum()) for ratio in self.ratios]
        self._measured += int(measured.sum())

    def counts(self) -> tuple[stq.Counts, Depth]:
        return self._stq.counts(), Depth(self._right.copy(), self._measured)


def count_ids(truth: np.ndarray, result: np.ndarray) -> Pairs:
    """Pairs of labels, class << 16 | instance, from maps of class * 10000 + instance. Raises PyvsegError for ids beyond void's."""
    for name, ids in (("annotation", truth), ("result", result)):
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < (VOID + 1) * DIVISOR:
            raise PyvsegError(f"the {name} holds ids from {ids.min()} to {ids.max()}; an id is class * {DIVISOR} + instance")
    pairs = count_pairs(truth, result)
    labels = ((ids // DIVISOR << stq.BITS) | ids % DIVISOR for ids in pairs[:2])
    return Pairs(*labels, pairs.pixels)


def relative_error(truth: np.ndarray, result: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """|result - truth| / truth, float32 (H, W), 0 where no depth was measured."""
    measured = _measured(truth, result, shape)
    error = np.zeros(shape, np.float32)
    error[measured] = np.abs(result[measured] - truth[measured]) / truth[measured]
    return error


def _measured(truth: np.ndarray, result: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    if not truth.shape == result.shape == tuple(shape):
        sizes = ", ".join(f"{each[1]}x{each[0]}" for each in (result.shape, truth.shape, shape))
        raise PyvsegError(f"result's depth, annotated depth and panoptic map are {sizes}; they must have the same size")
    return truth > 0


def _ratio(expected: np.ndarray, got: np.ndarray) -> np.ndarray:
    """How many times too large or too small; infinite where no depth is given."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(got > 0, np.maximum(got / expected, expected / got), np.inf)


def dvpq(counts: np.ndarray, num_things: int) -> tuple[float, float, float]:
    """All, things and stuff in percent of counts (num_classes, 4); things come first, and a class that never occurs counts as 0."""
    iou, tp, fp, fn = counts.T
    pq = iou / (tp + _EPSILON) * (tp / (tp + fn / 2 + fp / 2 + _EPSILON))
    return tuple(100 * float(part.mean()) for part in (pq, pq[:num_things], pq[num_things:]))


def dstq(sequences: Sequence[tuple[stq.Counts, Depth]]) -> dict[str, float | list[float]]:
    """{"DSTQ", "STQ", "AQ", "SQ", "DQ": float, "DQ by ratio", "DSTQ by ratio": list} of one sequence or of several together."""
    segmentation = stq.quality([counts for counts, _ in sequences])
    right, measured = sum(depth.right for _, depth in sequences), sum(depth.measured for _, depth in sequences)
    by_ratio = right / max(measured, 1)
    quality = float(np.prod(by_ratio) ** (1 / len(by_ratio)))
    total, *each = (float(np.cbrt(segmentation.stq**2 * dq)) for dq in (quality, *by_ratio))
    numbers = {"DSTQ": total, "STQ": segmentation.stq, "AQ": segmentation.aq, "SQ": segmentation.sq, "DQ": quality}
    return numbers | {"DQ by ratio": by_ratio.tolist(), "DSTQ by ratio": each}


def depth_errors(truth: np.ndarray, result: np.ndarray) -> dict[str, float]:
    """The errors of `ERRORS` where depth was measured; a1, a2, a3: the share within 1.25, its square, its cube. NaN where it was nowhere."""
    measured = _measured(truth, result, truth.shape)
    if not measured.any():
        return dict.fromkeys(ERRORS, float("nan"))
    expected, got = truth[measured].astype(np.float64), result[measured].astype(np.float64)
    worse, difference = _ratio(truth[measured], result[measured]), expected - got
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(expected) - np.log(got)
    values = (np.abs(difference) / expected).mean(), (difference**2 / expected).mean(), np.sqrt((difference**2).mean()), np.sqrt((logs**2).mean())
    return dict(zip(ERRORS, map(float, (*values, *((worse < 1.25**n).mean() for n in (1, 2, 3))))))
