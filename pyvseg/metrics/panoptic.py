# SPDX-License-Identifier: Apache-2.0
"""What the panoptic metrics share: how many pixels of a frame hold which pair of ids, and which segments a frame lists.

Label maps are compared by counting pairs of ids, one pass over the pixels of a frame for all metrics together: a map holds
every segment's mask at once, so that comparing mask by mask would read it as often as there are segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pyvseg.errors import PyvsegError

MAX_IDS = 1 << 24  # ids of segments; a pair of them fits an int64


class Pairs(NamedTuple):
    """Pixels by (annotation's id, result's id): (P,) int64 each, every pair once."""

    truth: np.ndarray
    result: np.ndarray
    pixels: np.ndarray


class Segments(NamedTuple):
    """The segments of a frame in the order of their list, (S,) each. Ids are in [1, 2^24), 0 is void and never listed."""

    ids: np.ndarray  # int64
    classes: np.ndarray  # int64
    crowd: np.ndarray  # bool
    areas: np.ndarray  # int64, pixels

    @classmethod
    def of(cls, ids: np.ndarray, classes: np.ndarray, crowd: np.ndarray | None = None, areas: np.ndarray | None = None) -> Segments:
        """Without `crowd` none is one; without `areas` `count_frame` counts them."""
        ids, classes = (np.asarray(each, np.int64).reshape(-1) for each in (ids, classes))
        crowd = np.zeros(len(ids), bool) if crowd is None else np.asarray(crowd, bool).reshape(-1)
        return cls(ids, classes, crowd, np.full(len(ids), -1) if areas is None else np.asarray(areas, np.int64).reshape(-1))


class Frame(NamedTuple):
    """All that the metrics need to know of a frame."""

    pairs: Pairs
    truth: Segments
    result: Segments


def count_pairs(truth: np.ndarray, result: np.ndarray) -> Pairs:
    """Counts the pixels of two id maps, int (H, W), ids in [0, 2^24). Raises PyvsegError where their sizes differ."""
    same_size(truth, result)
    truth, result = truth.ravel(), result.ravel()
    # Neighbours are mostly alike: runs of equal pairs leave a hundredth of the pixels to sort.
    starts = np.flatnonzero((truth[1:] != truth[:-1]) | (result[1:] != result[:-1])) + 1
    starts = np.concatenate(([0], starts))[: truth.size]
    return unpack(*tally((truth[starts].astype(np.int64) << 24) | result[starts], np.diff(starts, append=truth.size)))


def same_size(truth: np.ndarray, result: np.ndarray) -> None:
    """Raises PyvsegError."""
    if truth.shape != result.shape:
        sizes = "the result is {1}x{0}, its annotation {3}x{2}".format(*result.shape, *truth.shape)
        raise PyvsegError(f"{sizes}; save results at the annotation's size")


def tally(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every key once, ascending, with the sum of its counts; both (N,) int64."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))[: keys.size]
    return keys[starts], np.add.reduceat(counts[order], starts) if keys.size else counts[order]


def unpack(keys: np.ndarray, pixels: np.ndarray) -> Pairs:
    """`tally`'s result for keys `truth << 24 | result`."""
    return Pairs(keys >> 24, keys & (MAX_IDS - 1), pixels)


def merge_pairs(frames: Sequence[Pairs]) -> Pairs:
    """The pairs of several frames as of one image."""
    truth, result, pixels = map(np.concatenate, zip(*frames))
    return unpack(*tally((truth << 24) | result, pixels))


def position(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Where each of `ids` stands in the ascending `table`, -1 where it does not."""
    found = np.searchsorted(table, ids)
    inside = found < len(table)
    inside[inside] = table[found[inside]] == ids[inside]
    return np.where(inside, found, -1)


def areas_of(ids: np.ndarray, present: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Pixels of each of `ids` (S,), 0 where it is not `present`; (S,) int64."""
    table, sums = tally(present, pixels)
    at = position(ids, table)
    return np.where(at >= 0, sums[at], 0) if len(table) else np.zeros(len(ids), np.int64)


def count_frame(truth_map: np.ndarray, result_map: np.ndarray, truth: Segments, result: Segments, num_classes: int) -> Frame:
    """Counts a frame and checks that its lists fit.

    Areas that the annotation states are taken as they are, those of the result are counted.
    Raises PyvsegError for maps of different sizes, classes from `num_classes` on, ids that are listed twice, and result ids that
    are listed without pixels or have pixels without being listed.
    """
    pairs = count_pairs(truth_map, result_map)
    for name, segments in (("annotation", truth), ("result", result)):
        _check(name, segments, num_classes)
    present = np.unique(pairs.result[pairs.result > 0])
    if (unlisted := np.setdiff1d(present, result.ids)).size:
        raise PyvsegError(f"the result's image holds segment id {unlisted[0]}, which its list lacks")
    if (empty := np.setdiff1d(result.ids, present)).size:
        raise PyvsegError(f"the result lists segment id {empty[0]}, which no pixel of its image holds")
    counted = np.where(truth.areas < 0, areas_of(truth.ids, pairs.truth, pairs.pixels), truth.areas)
    return Frame(pairs, truth._replace(areas=counted), result._replace(areas=areas_of(result.ids, pairs.result, pairs.pixels)))


def count_labels(truth: np.ndarray, result: np.ndarray, num_classes: int, things: Sequence[int]) -> tuple[Frame, Pairs]:
    """Counts a frame of label maps (see `pyvseg.metrics.stq`), which need no lists: the frame for VPQ and the pairs of labels for STQ.

    A class of 255 is void, an annotated thing with instance 0 is crowd. Raises PyvsegError like `count_frame`.
    """
    pairs = count_pairs(truth, result)
    return frame_of_labels(pairs, num_classes, things), pairs


def frame_of_labels(pairs: Pairs, num_classes: int, things: Sequence[int]) -> Frame:
    """The frame for VPQ from pairs of labels, see `count_labels`."""
    ids = [np.where(labels >> 16 == 255, 0, labels + 1) for labels in pairs[:2]]  # id 0 is void, label 0 is not
    lists = []
    for each in ids:
        listed = np.unique(each[each > 0])
        lists.append(Segments.of(listed, listed - 1 >> 16, areas=areas_of(listed, each, pairs.pixels)))
    lists[0] = lists[0]._replace(crowd=np.isin(lists[0].classes, things) & (lists[0].ids - 1 & 0xFFFF == 0))
    for name, segments in zip(("annotation", "result"), lists):
        _check(name, segments, num_classes)
    return Frame(unpack(*tally(ids[0] << 24 | ids[1], pairs.pixels)), *lists)


def _check(name: str, segments: Segments, num_classes: int) -> None:
    ids, classes = segments.ids, segments.classes
    if (wrong := (classes < 0) | (classes >= num_classes)).any():
        raise PyvsegError(f"the {name}'s segment {ids[wrong][0]} has class {classes[wrong][0]}, but classes go from 0 to {num_classes - 1}")
    if (wrong := (ids <= 0) | (ids >= MAX_IDS)).any():
        raise PyvsegError(f"the {name} lists segment id {ids[wrong][0]}; ids go from 1 to {MAX_IDS - 1}, 0 is void")
    if len(np.unique(ids)) < len(ids):
        table, times = np.unique(ids, return_counts=True)
        raise PyvsegError(f"the {name} lists segment id {table[times > 1][0]} twice in a frame")
