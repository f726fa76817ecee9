# SPDX-License-Identifier: Apache-2.0
"""The online tracker of CTVIS (Ying et al., ICCV 2023): detections of a frame against a memory bank of tracklets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg.ops import greedy_assignment, mask_overlap, memory_match, pack_masks


@dataclass(frozen=True)
class TrackerSettings:
    """The published rules.

    select, init    a frame's queries above the first score are detections (the best one in any case), above the second start tracklets
    overlap         of two masks with a larger IoU the one of lower score is dropped
    match           similarity that a detection needs to continue a tracklet
    dead_frames     a tracklet that was not seen for longer leaves the bank
    cache           embeddings that a tracklet keeps
    noise_after, noise_frames, noise_absent   after this many frames of the video, records seen in fewer frames than the second
                    and absent since the third are deleted
    """

    select: float = 0.01
    init: float = 0.01
    overlap: float = 0.6
    match: float = 0.3
    dead_frames: int = 20
    cache: int = 10
    noise_after: int = 8
    noise_frames: int = 3
    noise_absent: int = 2


@dataclass
class Tracklet:
    """What the bank knows of one identity; `embedding` (C,) is what detections are compared with."""

    embedding: Tensor
    cache: list[Tensor]
    last: int
    frames: int = 1

    def update(self, embedding: Tensor, frame: int, cache: int) -> None:
        """The more the new embedding resembles the cached ones, the more it counts."""
        similarity = F.normalize(torch.stack(self.cache), dim=-1) @ F.normalize(embedding, dim=-1)
        share = similarity.mean().clamp(min=0)
        self.embedding = (1 - share) * self.embedding + share * embedding
        self.cache = [*self.cache, embedding][-cache:]
        self.last, self.frames = frame, self.frames + 1


@dataclass
class Record:
    """What a result will say of one identity. `key` is new whenever the identity's record starts again."""

    key: int
    logits: Tensor  # (K + 1,) sum over the frames
    last: int = -1  # frame
    frames: int = 0

    @property
    def mean_logits(self) -> Tensor:
        return self.logits / self.frames


@dataclass
class TrackerState:
    """All that a video's later frames depend on; the bank is bounded, the records grow by the identities."""

    frame: int = 0  # the next one
    ids: int = 0  # given so far
    keys: int = 0
    bank: dict[int, Tracklet] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)


class Tracked(NamedTuple):
    """What the tracker made of one frame.

    scores      (S,) of the detections, descending, and which of them mask suppression kept: (S,) bool
    detections  (N,) their queries after suppression
    similarity  (N, M) of detections and tracklets; None while the bank is empty
    ids         of those detections that have an identity, and their queries
    queries
    keys        of their records
    """

    scores: Tensor
    kept: Tensor
    detections: Tensor
    similarity: Tensor | None
    ids: list[int]
    queries: list[int]
    keys: list[int]


def track(state: TrackerState, logits: Tensor, masks: Tensor, embeddings: Tensor, settings: TrackerSettings) -> Tracked:
    """Give identities to the detections of the next frame.

    logits (Q, K + 1) of the classes, masks (Q, h, w) logits, embeddings (Q, C)
    """
    logits, embeddings = logits.float(), embeddings.float()
    scores, order = logits.softmax(-1)[:, :-1].amax(-1).sort(descending=True, stable=True)
    count = max(1, int((scores > settings.select).sum()))
    kept = suppress(masks[order[:count]], settings.overlap)
    detections, found = order[:count][kept], scores[:count][kept]
    similarity, ids = _match(state, embeddings[detections], settings)
    for i, score in enumerate(found.tolist()):
        if ids[i] < 0 and score > settings.init:
            ids[i] = state.ids
            state.ids += 1
    rows = [i for i, name in enumerate(ids) if name >= 0]
    names, queries = [ids[i] for i in rows], detections[rows].tolist()
    _remember(state, names, embeddings[queries], settings)
    keys = _record(state, names, queries, logits, settings)
    state.frame += 1
    return Tracked(scores[:count], kept, detections, similarity, names, queries, keys)


def suppress(masks: Tensor, threshold: float) -> Tensor:
    """(N,) bool: which masks (N, h, w), logits in order of score, overlap no better one that was kept.

    The ratio is rounded to float32, as published: exact ratios such as 3 / 5 occur, and the rounding decides about them.
    """
    overlaps = overlap_ratios(masks).cpu().numpy() > np.float32(threshold)
    kept = torch.ones(len(masks), dtype=torch.bool)
    alive = kept.numpy()
    for i in range(len(masks)):
        if alive[i]:
            alive[i + 1 :] &= ~overlaps[i, i + 1 :]
    return kept.to(masks.device)


def overlap_ratios(masks: Tensor) -> Tensor:
    """(N, N) float32: intersection over union of masks (N, h, w), bool or logits, both plus 1e-6: 1 for two empty masks."""
    packed = pack_masks(masks)
    intersection, area, _ = mask_overlap(packed, packed)
    union = area[:, None] + area - intersection
    return (intersection.float() + 1e-6) / (union.float() + 1e-6)


def _match(state: TrackerState, embeddings: Tensor, settings: TrackerSettings) -> tuple[Tensor | None, list[int]]:
    """Similarities to the bank, and the identity of each detection, -1 where it fits none."""
    if not state.bank:
        return None, [-1] * len(embeddings)
    bank = list(state.bank.values())
    similarity = memory_match(embeddings, torch.stack([t.embedding for t in bank]), "bisoftmax")
    weights = torch.tensor([t.frames for t in bank], dtype=torch.float32)
    names = list(state.bank)
    return similarity, [names[j] if j >= 0 else -1 for j in greedy_assignment(similarity, settings.match, weights=weights).tolist()]


def _remember(state: TrackerState, ids: list[int], embeddings: Tensor, settings: TrackerSettings) -> None:
    """Update the bank; the dead leave it."""
    for name, embedding in zip(ids, embeddings.unbind()):
        if name in state.bank:
            state.bank[name].update(embedding, state.frame, settings.cache)
        else:
            state.bank[name] = Tracklet(embedding, [embedding], state.frame)
    for name in [name for name, t in state.bank.items() if state.frame - t.last > settings.dead_frames]:
        del state.bank[name]


def _record(state: TrackerState, ids: list[int], queries: list[int], logits: Tensor, settings: TrackerSettings) -> list[int]:
    """Write the frame into the records; records that look like noise go."""
    keys = []
    for name, query in zip(ids, queries):
        if name not in state.records:
            state.records[name] = Record(state.keys, torch.zeros_like(logits[query]))
            state.keys += 1
        record = state.records[name]
        record.logits = record.logits + logits[query]
        record.last, record.frames = state.frame, record.frames + 1
        keys.append(record.key)
    if state.frame > settings.noise_after:
        for name, record in list(state.records.items()):
            absent = state.frame - record.last
            if absent >= settings.noise_absent and record.frames < settings.noise_frames:
                del state.records[name]
    return keys
