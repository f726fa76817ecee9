# SPDX-License-Identifier: Apache-2.0
"""Identities of a video's segments across clips (Video-kMaX, Shin et al., WACV 2024): stitching by the overlap of the frame that two
clips share, and HiLA-MB, a memory of appearances and boxes for what the overlap does not tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyvseg.errors import PyvsegError
from pyvseg.models.kmax_panoptic import ClipPanoptic
from pyvseg.ops import hungarian_assignment, memory_match

Pairs = list[tuple[int, int]]  # segment, panoptic value


@dataclass(frozen=True)
class LinkSettings:
    """Published constants.

    memory        HiLA-MB after stitching; without it only the overlap links clips
    confidence    score that a segment needs to continue one of the memory
    buffer        clip starts differ by at most so many frames from when a segment of the memory was last seen
    temperature   of the distance between boxes
    momentum      share of the old appearance
    divisor       a panoptic value is category * divisor + id
    within_clips  whether `join_within` comes first; published as an option that is off
    """

    memory: bool = True
    confidence: float = 0.7
    buffer: int = 10
    temperature: float = 1.0
    momentum: float = 0.8
    divisor: int = 10000
    within_clips: bool = False


@dataclass
class Remembered:
    """One object.

    appearance   (C,)
    boxes        the last two (4,); where it was not seen, the box that went on as the two before it, which may leave the frame
    last         first frame of the clip where it was last seen
    """

    appearance: np.ndarray
    boxes: tuple[np.ndarray, np.ndarray]
    last: int


@dataclass
class LinkState:
    """What a video's later clips depend on. Bounded: the memory forgets, and ids that nothing bears any more return.

    next_id    the last id given
    frame      labels (H, W) of the last frame and the panoptic values behind them
    memory     by panoptic value
    stuff      category -> its panoptic value in this video
    """

    next_id: int | None = None
    labels: np.ndarray | None = None
    values: np.ndarray | None = None
    memory: dict[int, Remembered] = field(default_factory=dict)
    stuff: dict[int, int] = field(default_factory=dict)


class Linked(NamedTuple):
    """values         (S + 1,) int32: the panoptic value of each label of the clip, 0 for void, with stuff of the video merged
    tracked        the same before the merge
    matched        by overlap: (segment, value of the previous clip)
    unmatched      (segment, value that it got)
    decoded        where the memory was asked: its scores, the values asked for and those in the memory"""

    values: np.ndarray
    tracked: np.ndarray
    matched: Pairs
    unmatched: Pairs
    decoded: tuple[np.ndarray, list[int], list[int]] | None


def link(clip: ClipPanoptic, start: int, overlaps: bool, state: LinkState, settings: LinkSettings) -> Linked:
    """Gives every segment of the clip its panoptic value.

    start      number of the clip's first frame
    overlaps   the clip's first frame is the last of the previous clip
    """
    present = np.bincount(clip.labels.ravel(), minlength=len(clip.segments) + 1) > 0
    present[0] = False
    categories = np.array([0, *(s.category for s in clip.segments)], np.int64)
    values = np.where(present, categories * settings.divisor + np.arange(len(categories)), 0)
    matched, unmatched, decoded = [], [], None
    if state.next_id is None:
        state.next_id = int((values % settings.divisor).max(initial=0))
        if settings.memory:
            _encode(state, {int(values[s]): s for s in _things(clip, present)}, clip, start, settings)
    else:
        matched = _stitch(clip, state, settings) if overlaps else []
        unmatched = _fresh(values, present, {s for s, _ in matched}, state, settings)
        for s, value in (*matched, *unmatched):
            values[s] = value
        if settings.memory:
            decoded = _remember(clip, values, matched, unmatched, start, state, settings)
    state.labels, state.values = clip.labels[-1], values
    return Linked(_merge_stuff(clip, values, state).astype(np.int32), values.astype(np.int32), matched, unmatched, decoded)


def join_within(clip: ClipPanoptic, settings: LinkSettings) -> ClipPanoptic:
    """Objects seen only in the clip's first frame and only later become one where they score as one of the memory would."""
    present = np.stack([np.bincount(frame.ravel(), minlength=len(clip.segments) + 1) > 0 for frame in clip.labels])
    early, late = present[0] & ~present[1:].any(0), ~present[0] & present[1:].any(0)
    things = _things(clip, present.any(0))
    before, after = [s for s in things if early[s]], [s for s in things if late[s]]
    if not before or not after:
        return clip
    segments, table = list(clip.segments), np.arange(len(clip.segments) + 1, dtype=clip.labels.dtype)
    sides = [[(segments[s - 1].feature, segments[s - 1].box) for s in side] for side in (before, after)]
    for a, j in zip(before, hungarian_assignment(_match(*sides, settings), settings.confidence).tolist()):
        one, other = segments[a - 1], segments[after[j] - 1]
        if j >= 0 and one.category == other.category:
            box = np.concatenate([np.minimum(one.box[:2], other.box[:2]), np.maximum(one.box[2:], other.box[2:])])
            segments[a - 1] = replace(one, feature=(one.feature + other.feature) / 2, box=box)
            segments[after[j] - 1] = replace(other, box=None)
            table[after[j]] = a
    return ClipPanoptic(table[clip.labels], segments)


def _things(clip: ClipPanoptic, present: np.ndarray) -> list[int]:
    return [s for s, segment in enumerate(clip.segments, 1) if segment.is_thing and present[s]]


def _stitch(clip: ClipPanoptic, state: LinkState, settings: LinkSettings) -> Pairs:
    """Pairs (segment, previous value) that choose each other by the Dice overlap on the shared frame and are of one category.

    Published pairs without any overlap too, where both are each other's leftovers.
    """
    shape = len(state.values), len(clip.segments) + 1
    both = state.labels.astype(np.int32) * shape[1] + clip.labels[0]
    joint = np.bincount(both.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    before, now = joint.sum(1), joint.sum(0)
    rows = sorted((i for i in np.flatnonzero(before) if state.values[i]), key=lambda i: state.values[i])
    columns = sorted(
        (j for j in np.flatnonzero(now) if j), key=lambda j: clip.segments[j - 1].category * settings.divisor + j
    )
    if not rows or not columns:
        return []
    inside = joint[np.ix_(rows, columns)]
    dice = 2 * inside / (before[rows, None] + now[columns])
    forward, backward = _choose(dice), {x: y for y, x in _choose(dice.T).items()}
    agreed = [(x, y) for x, y in forward.items() if backward.get(x) == y]
    pairs = [(columns[y], int(state.values[rows[x]])) for x, y in agreed]
    return [(int(s), value) for s, value in pairs if value // settings.divisor == clip.segments[s - 1].category]


def _choose(dice: np.ndarray) -> dict[int, int]:
    """Columns, in the order of their best overlap, take their best row that is still free: {row: column}."""
    taken: dict[int, int] = {}
    for y in np.argsort(-dice.max(0), kind="stable"):
        free = (x for x in np.argsort(-dice[:, y], kind="stable") if x not in taken)
        x = next(free, None)
        if x is not None:
            taken[int(x)] = int(y)
    return taken


def _fresh(values: np.ndarray, present: np.ndarray, taken: set[int], state: LinkState, settings: LinkSettings) -> Pairs:
    """New ids for the segments that are left, by rising value."""
    left = [int(s) for s in np.flatnonzero(present) if s not in taken]
    ids = _free_ids(state, settings.divisor)
    return [(s, int(values[s]) // settings.divisor * settings.divisor + next(ids)) for s in sorted(left, key=lambda s: values[s])]


def _free_ids(state: LinkState, divisor: int) -> Iterator[int]:
    """One more than the last, as published. After the largest come those that nothing bears any more, from 1 on."""
    borne = {int(value) % divisor for value in (*state.memory, *state.values, *state.stuff.values())}
    for _ in range(divisor):
        state.next_id = state.next_id % (divisor - 1) + 1
        if state.next_id not in borne:
            yield state.next_id
    raise PyvsegError(f"a panoptic value has room for {divisor - 1} ids and all are in use; choose a larger divisor")


def _remember(
    clip: ClipPanoptic, values: np.ndarray, matched: Pairs, unmatched: Pairs, start: int, state: LinkState, settings: LinkSettings
) -> tuple[np.ndarray, list[int], list[int]] | None:
    """Asks the memory for what the overlap left over and writes what it knows into `values`, then brings it up to date."""
    things = {s: segment for s, segment in enumerate(clip.segments, 1) if segment.is_thing}
    known = {value: s for s, value in matched if s in things}
    new = {value: s for s, value in unmatched if s in things}
    candidates = [value for value in state.memory if value not in known]
    decoded = None
    if new and candidates:
        asked = [(clip.segments[s - 1].feature, clip.segments[s - 1].box) for s in new.values()]
        scores = _match(asked, [(state.memory[c].appearance, state.memory[c].boxes[1]) for c in candidates], settings)
        decoded = scores.numpy(), list(new), candidates
        match = hungarian_assignment(scores, settings.confidence).tolist()
        # Published: what is new and finds nothing in a memory that is not empty does not enter it.
        found = {}
        for (value, s), j in zip(list(new.items()), match):
            if j >= 0 and candidates[j] // settings.divisor == value // settings.divisor:
                values[s] = candidates[j]
                found[candidates[j]] = s
        new = found
    _encode(state, {**new, **known}, clip, start, settings)
    return decoded


def _match(ours: list[tuple[np.ndarray, np.ndarray]], theirs: list[tuple[np.ndarray, np.ndarray]], settings: LinkSettings) -> Tensor:
    """Scores of two lists of (feature, box)."""
    (features, boxes), (memory, places) = ([torch.from_numpy(np.stack(part)) for part in zip(*side)] for side in (ours, theirs))
    return memory_match(features, memory, "cosine", locations=boxes, memory_locations=places, temperature=settings.temperature)


def _encode(state: LinkState, seen: dict[int, int], clip: ClipPanoptic, start: int, settings: LinkSettings) -> None:
    """seen: panoptic value -> segment. Everything else goes on as expected, and is forgotten after a while."""
    for value, s in seen.items():
        segment = clip.segments[s - 1]
        if value in state.memory:
            old = state.memory[value]
            old.appearance = settings.momentum * old.appearance + (1 - settings.momentum) * segment.feature
            old.boxes = old.boxes[1], segment.box
            old.last = start
        else:
            state.memory[value] = Remembered(segment.feature, (segment.box, segment.box), start)
    for value, old in list(state.memory.items()):
        if value not in seen:
            old.boxes = old.boxes[1], 2 * old.boxes[1] - old.boxes[0]
            if start - old.last > settings.buffer:
                del state.memory[value]


def _merge_stuff(clip: ClipPanoptic, values: np.ndarray, state: LinkState) -> np.ndarray:
    """Stuff of a category that the video had before takes its value from then."""
    merged = values.copy()
    for s, segment in enumerate(clip.segments, 1):
        if values[s] and not segment.is_thing:
            merged[s] = state.stuff.setdefault(segment.category, int(values[s]))
    return merged
