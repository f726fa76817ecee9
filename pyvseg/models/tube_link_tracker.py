# SPDX-License-Identifier: Apache-2.0
"""The tracker of Tube-Link (Li et al., ICCV 2023), from IDOL (Wu et al., ECCV 2022): the objects of a tube against those of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyvseg.models.ctvis_tracker import overlap_ratios, suppress
from pyvseg.ops import greedy_assignment, memory_match

BACKDROP, DROPPED = -1, -2  # objects without an identity
IDS = 9_998  # that a class has room for; then those that nothing bears any more return


@dataclass(frozen=True)
class TubeTrackerSettings:
    """The published rules.

    overlap    of two masks with a larger IoU the later one is dropped
    backdrop   an object without identity is a backdrop if its IoU with all earlier ones is below
    init, new  scores above which objects open a track: while there are none, and later
    match      similarity that an object needs to continue a track
    frames     a track that was not seen for so many frames is forgotten
    momentum   share of the new embedding
    """

    overlap: float = 0.7
    backdrop: float = 0.3
    init: float = 0.2
    new: float = 0.5
    match: float = 0.5
    frames: int = 10
    momentum: float = 0.5


@dataclass
class TubeTrack:
    """embedding (C,); last: first frame of the tube where it was last seen"""

    embedding: Tensor
    last: int


@dataclass
class TubeTracks:
    """All that a video's later tubes depend on; bounded, for the tracks are forgotten. `ids`: given so far."""

    ids: int = 0
    tracks: dict[int, TubeTrack] = field(default_factory=dict)


class Tracked(NamedTuple):
    """Which objects mask suppression kept, (N,) bool, and an identity, BACKDROP or DROPPED for each of those."""

    kept: Tensor
    ids: list[int]


def track(state: TubeTracks, scores: Tensor, masks: Tensor, embeddings: Tensor, frame: int, settings: TubeTrackerSettings) -> Tracked:
    """Identities of a tube's objects, in the order given: the published suppression does not look at their scores.

    scores (N,), masks (N, H, W) bool in one frame of the tube, embeddings (N, C); `frame` is the first one of the tube
    """
    kept = suppress(masks, settings.overlap)
    embeddings, masks = embeddings[kept].float(), masks[kept]
    ids, least = [BACKDROP] * len(masks), settings.init
    if state.tracks:
        names, least = list(state.tracks), settings.new
        similarity = memory_match(embeddings, torch.stack([t.embedding for t in state.tracks.values()]), "bisoftmax")
        ids = [names[j] if j >= 0 else BACKDROP for j in greedy_assignment(similarity, settings.match).tolist()]
    for i, score in enumerate(scores[kept].tolist()):
        if ids[i] < 0 and score > least:
            ids[i] = _next_id(state)
            state.tracks[ids[i]] = TubeTrack(embeddings[i], frame)
        elif ids[i] >= 0:
            old = state.tracks[ids[i]]
            old.embedding, old.last = (1 - settings.momentum) * old.embedding + settings.momentum * embeddings[i], frame
    state.tracks = {name: t for name, t in state.tracks.items() if frame - t.last < settings.frames}
    return Tracked(kept, _without_backdrops(ids, masks, settings.backdrop))


def _next_id(state: TubeTracks) -> int:
    while state.ids % IDS in state.tracks:
        state.ids += 1
    state.ids += 1
    return (state.ids - 1) % IDS


def _without_backdrops(ids: list[int], masks: Tensor, most: float) -> list[int]:
    if BACKDROP not in ids:
        return ids
    overlaps = overlap_ratios(masks).cpu()
    return [DROPPED if name == BACKDROP and (overlaps[i, :i] >= most).any() else name for i, name in enumerate(ids)]
