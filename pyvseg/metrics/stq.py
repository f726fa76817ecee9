# SPDX-License-Identifier: Apache-2.0
"""Segmentation and tracking quality (Weber et al., STEP, NeurIPS 2021) as DeepLab2's evaluation computes it.

Maps hold labels: class << 16 | instance, instance 0 of a thing = crowd in annotations. STQ = sqrt(AQ * SQ): AQ rates how well tubes
keep their identity, whatever their class; SQ is the mean IoU of the classes. Two habits of the published program are kept:
results on void count into the size of their tube, and annotated pixels that a result leaves void add one class of IoU 0 to the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pyvseg.errors import PyvsegError
from pyvseg.metrics.panoptic import Pairs, Segments, position, tally

BITS = 16  # of a label's instance
IGNORE = 255  # class of void
VOID = IGNORE << BITS
_INSTANCES = (1 << BITS) - 1
_PENDING = 1 << 16  # rows that wait before they are summed


class Counts(NamedTuple):
    """What a sequence adds to the totals."""

    confusion: np.ndarray  # (K, K) or, with void, (K + 1, K + 1) int64, annotation by result; annotated void is left out
    association: float  # sum over the annotated tubes
    tubes: int  # annotated ones


class Quality(NamedTuple):
    """Fractions; NaN where no class occurs."""

    stq: float
    aq: float
    sq: float


class SequenceSTQ:
    """Counts one sequence, frame by frame; memory follows the number of pairs of tubes."""

    def __init__(self, num_classes: int, things: Sequence[int], ignore: int = IGNORE) -> None:
        """ignore: the class of void; beyond `num_classes` it gets a row and a column of its own."""
        self.num_classes, self.ignore = num_classes, ignore
        size = num_classes + (ignore >= num_classes)
        self._confusion = np.zeros((size, size), np.int64)
        self._is_thing = np.isin(np.arange(size), things)
        self._truth, self._result, self._both = _Tally(), _Tally(), _Tally()

    def update(self, pairs: Pairs) -> None:
        """A frame's pixels by pair of labels. Raises PyvsegError for a class that is neither below `num_classes` nor void."""
        truth, result = self._classes("annotation", pairs.truth), self._classes("result", pairs.result)
        size = len(self._confusion)
        self._confusion += np.bincount(truth * size + result, pairs.pixels, size * size).astype(np.int64).reshape(size, size)
        crowd = self._is_thing[truth] & (pairs.truth & _INSTANCES == 0)
        in_truth, in_result = self._is_thing[truth] & ~crowd, self._is_thing[result] & ~crowd
        self._truth.add(pairs.truth[in_truth], pairs.pixels[in_truth])
        self._result.add(pairs.result[in_result], pairs.pixels[in_result])
        both = in_truth & in_result
        self._both.add((pairs.truth[both] << 24) | pairs.result[both], pairs.pixels[both])

    def counts(self) -> Counts:
        confusion = self._confusion.copy()
        confusion[min(self.ignore, self.num_classes)] = 0
        (truth, truth_sizes), (result, result_sizes), (both, inside) = (each.sums() for each in (self._truth, self._result, self._both))
        truth_sizes = truth_sizes[position(both >> 24, truth)]
        union = truth_sizes + result_sizes[position(both & 0xFFFFFF, result)] - inside
        return Counts(confusion, float((inside * (inside / union) / truth_sizes).sum()), len(truth))

    def _classes(self, name: str, labels: np.ndarray) -> np.ndarray:
        """Rows of the confusion matrix."""
        classes = labels >> BITS
        void = classes == self.ignore
        if (wrong := (classes >= self.num_classes) & ~void).any():
            raise PyvsegError(f"the {name} holds class {classes[wrong][0]}; classes go from 0 to {self.num_classes - 1}, and {self.ignore} is void")
        return np.where(void, min(self.ignore, self.num_classes), classes)


class _Tally:
    """Sums by int64 key; rows are summed in bulk, so that memory follows the number of keys and not that of frames."""

    def __init__(self) -> None:
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []
        self._pending, self._limit = 0, _PENDING

    def add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        self._rows.append((keys, counts))
        self._pending += len(keys)
        if self._pending > self._limit:
            keys, _ = self.sums()
            self._pending, self._limit = len(keys), 2 * len(keys) + _PENDING

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Every key once, ascending, and its sum."""
        if not self._rows:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._rows = [tally(*map(np.concatenate, zip(*self._rows)))]
        return self._rows[0]


def quality(sequences: Iterable[Counts]) -> Quality:
    """Of one sequence or of several together."""
    confusions, association, tubes = zip(*sequences)
    confusion = sum(confusions)
    inside = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - inside
    occurs = union > 0
    sq = float((inside[occurs] / union[occurs]).mean()) if occurs.any() else float("nan")
    aq = sum(association) / max(sum(tubes), 1e-15)
    return Quality(float(np.sqrt(aq * sq)), aq, sq)


def number_segments(frames: Sequence[Segments]) -> list[np.ndarray]:
    """Labels of the segments of each frame of a video: instances are numbered from 0 in the order of their first appearance.

    This is how the VIPSeg evaluation makes labels. It makes a crowd of a thing that is listed before everything else of its video.
    Raises PyvsegError for more segments than a label can number.
    """
    ids = np.concatenate([segments.ids for segments in frames])
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    numbers = np.argsort(np.argsort(first))[inverse]
    if numbers.max(initial=0) > _INSTANCES:
        raise PyvsegError(f"the video has {numbers.max() + 1} segments; STQ can number {_INSTANCES + 1}")
    classes = np.concatenate([segments.classes for segments in frames])
    return np.split((classes << BITS) | numbers, np.cumsum([len(segments.ids) for segments in frames])[:-1])


def relabel(ids: np.ndarray, segments: Segments, labels: np.ndarray) -> np.ndarray:
    """Ids (P,) of a frame as the labels (S,) of its segments, void where none is listed."""
    order = np.argsort(segments.ids)
    return np.append(labels[order], VOID)[position(ids, segments.ids[order])]
