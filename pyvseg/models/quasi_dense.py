# SPDX-License-Identifier: Apache-2.0
"""The quasi-dense tracker (Pang et al., CVPR 2021) of Video K-Net and PolyphonicFormer: detections of a frame against the tracks
of the last frames and the backdrops, detections of the frame before that became no track."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyvseg.errors import PyvsegError
from pyvseg.ops import greedy_assignment, memory_match


@dataclass(frozen=True)
class QuasiDenseSettings:
    """The published rules.

    init, hold     scores above which a detection starts a track, and may continue one
    match          similarity above which it does
    overlap        of two detections with a larger IoU the one of lower score is dropped,
    weak_overlap   or with this where its score is below `hold`; backdrops do not overlap by more than it either
    frames         after which a track that nothing continues is forgotten
    momentum       the share of a new embedding in its track's
    most           ids before they begin anew with those that nothing bears; published: without end
    """

    init: float = 0.35
    hold: float = 0.3
    match: float = 0.5
    overlap: float = 0.7
    weak_overlap: float = 0.3
    frames: int = 5
    momentum: float = 0.8
    most: int = 9999


@dataclass
class Track:
    """embedding (C,) and box (5,) as in `Detections`, label, and the frame where it was seen last."""

    embedding: np.ndarray
    box: np.ndarray
    label: int
    last: int


class Detections(NamedTuple):
    """boxes (N, 5) float32: x1, y1, x2, y2 in pixels and the score; labels (N,) int64; embeddings (N, C) float32."""

    boxes: np.ndarray
    labels: np.ndarray
    embeddings: np.ndarray


@dataclass
class QuasiDenseState:
    """All that later frames depend on; bounded. `tracks` by id, in the order of their beginning."""

    next_id: int = 0
    tracks: dict[int, Track] = field(default_factory=dict)
    backdrops: list[Track] = field(default_factory=list)


class Matched(NamedTuple):
    """kept (M,): rows of the detections, by falling score, duplicates left out; ids (M,): -1 of no track, -2 too weak for the track
    that it matches."""

    kept: np.ndarray
    ids: np.ndarray


def track(state: QuasiDenseState, found: Detections, frame: int, settings: QuasiDenseSettings) -> Matched:
    """Gives ids to the detections of a frame, on the CPU. A frame without any is left out; tracks age by the number of the frame."""
    order = np.argsort(-found.boxes[:, 4], kind="stable")
    overlaps = _overlaps(found.boxes[order])
    kept = _distinct(found.boxes[order, 4], overlaps, settings)
    order, overlaps = order[kept], overlaps[np.ix_(kept, kept)]
    found = Detections(*(part[order] for part in found))
    ids = _match(state, found, settings)
    fresh = (ids == -1) & (found.boxes[:, 4] > np.float32(settings.init))
    ids[fresh] = _fresh_ids(state, int(fresh.sum()), settings)
    _remember(state, found, ids, frame, settings)
    _keep_backdrops(state, found, ids, overlaps, frame, settings)
    return Matched(order, ids)


def _overlaps(boxes: np.ndarray) -> np.ndarray:
    """IoU (N, N) of boxes without any pixel added: one that is a pixel wide has no area, and overlaps nothing."""
    x1, y1, x2, y2 = boxes[:, :4].T
    area = (x2 - x1) * (y2 - y1)
    width, height = (
        np.maximum(np.minimum(high[:, None], high) - np.maximum(low[:, None], low), 0) for low, high in ((x1, x2), (y1, y2))
    )
    both = width * height
    return both / np.maximum(area[:, None] + area - both, np.float32(1e-6))


def _distinct(scores: np.ndarray, overlaps: np.ndarray, settings: QuasiDenseSettings) -> np.ndarray:
    """(N,) bool: what overlaps no better one too much, be that one kept or not."""
    most = np.where(scores < np.float32(settings.hold), np.float32(settings.weak_overlap), np.float32(settings.overlap))
    return ~(np.tril(overlaps, -1) > most[:, None]).any(1)


def similarity(state: QuasiDenseState, found: Detections) -> Tensor | None:
    """(N, M) of detections to tracks, then to backdrops; None while there is no track."""
    if not state.tracks:
        return None
    memory = [*state.tracks.values(), *state.backdrops]
    labels, embeddings = torch.tensor([each.label for each in memory]), np.stack([each.embedding for each in memory])
    own = map(torch.from_numpy, (found.embeddings, embeddings))
    return memory_match(*own, labels=torch.from_numpy(found.labels), memory_labels=labels)


def _match(state: QuasiDenseState, found: Detections, settings: QuasiDenseSettings) -> np.ndarray:
    scores = similarity(state, found)
    if scores is None:
        return np.full(len(found.boxes), -1)
    names = np.array([*state.tracks, *(-1 for _ in state.backdrops)])
    strong = found.boxes[:, 4] > np.float32(settings.hold)
    claims = torch.from_numpy(strong[:, None] & (names >= 0))
    chosen = greedy_assignment(scores, settings.match, claims=claims).numpy()
    ids = np.where(chosen < 0, -1, names[chosen])
    return np.where((ids >= 0) & ~strong, -2, ids)


def _fresh_ids(state: QuasiDenseState, count: int, settings: QuasiDenseSettings) -> list[int]:
    """Raises PyvsegError where so many are not free."""
    free = (name % settings.most for name in range(state.next_id, state.next_id + settings.most) if name % settings.most not in state.tracks)
    names = list(islice(free, count))
    if len(names) < count:
        raise PyvsegError(f"{count} more things than the {settings.most} ids have room for")
    state.next_id = (names[-1] + 1) % settings.most if names else state.next_id
    return names


def _remember(state: QuasiDenseState, found: Detections, ids: np.ndarray, frame: int, settings: QuasiDenseSettings) -> None:
    for row, name in enumerate(ids.tolist()):
        if name < 0:
            continue
        embedding = found.embeddings[row]
        if name in state.tracks:
            embedding = (1 - settings.momentum) * state.tracks[name].embedding + settings.momentum * embedding
        state.tracks[name] = Track(embedding, found.boxes[row], int(found.labels[row]), frame)
    state.tracks = {name: each for name, each in state.tracks.items() if frame - each.last < settings.frames}


def _keep_backdrops(
    state: QuasiDenseState, found: Detections, ids: np.ndarray, overlaps: np.ndarray, frame: int, settings: QuasiDenseSettings
) -> None:
    """Only those of this frame."""
    apart = ~(np.tril(overlaps, -1) > np.float32(settings.weak_overlap)).any(1)
    rows = np.flatnonzero((ids == -1) & apart).tolist()
    state.backdrops = [Track(found.embeddings[i], found.boxes[i], int(found.labels[i]), frame) for i in rows]
