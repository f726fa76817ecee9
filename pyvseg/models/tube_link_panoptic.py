# SPDX-License-Identifier: Apache-2.0
"""Tube-Link (Li et al., ICCV 2023), video panoptic segmentation: every tube's objects are linked to those of the tube before
by attention to its queries, and followed by their embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyvseg.layers.attention import MLP, Attention, FeedForward
from pyvseg.layers.pixel_decoder import PixelFeatures
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.tube_link_maps import TubeMaps, TubeMapSettings, TubeMapsState
from pyvseg.models.tube_link_tracker import BACKDROP, Tracked, TubeTrackerSettings, track
from pyvseg.ops import mask_overlap, pack_masks


@dataclass(frozen=True)
class TubeLinkPanopticSettings(TubeMapSettings):
    """Published constants.

    link_ffn            inner width of the linking feed-forward layer
    object_threshold    queries of no higher class score do not take part
    overlap_threshold   a segment must win this share of its own mask
    compat              as published, where it goes wrong: after an object that mask suppression dropped the next ones take each other's
                        ids; a frame without things makes the tube forget those of its earlier frames, and a last one without
                        leaves the tube untracked
    """

    link_ffn: int = 1024
    object_threshold: float = 0.8
    overlap_threshold: float = 0.8
    tracker: TubeTrackerSettings = TubeTrackerSettings()
    compat: bool = True


class TubePanoptic(NamedTuple):
    """One tube.

    labels   (T, H, W) uint8 or int16: 0 void, else 1 + the number of the segment
    queries, classes, scores   (S,) of the segments, by rising query
    listed   (T, S) bool: segments that count in the frame; a few of these have no pixel there
    states   (Q, C) the tube's queries
    """

    labels: Tensor
    queries: Tensor
    classes: Tensor
    scores: Tensor
    listed: Tensor
    states: Tensor


class LinkedTube(NamedTuple):
    """instances (S,) of the segments: 0 for stuff and for things without identity; with what the tracker was asked and what it said."""

    instances: list[int]
    queries: Tensor
    things: list[int]
    embeddings: Tensor | None
    tracked: Tracked | None


class Linker(nn.Module):
    """What a query becomes by the queries of the tube before, and the embedding that it is followed by."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.norm = Attention(width, heads), nn.LayerNorm(width)
        self.ffn = FeedForward(width, hidden)
        self.embed = nn.Sequential(nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
        self.head = MLP(width, width, width)

    def forward(self, queries: Tensor, before: Tensor) -> Tensor:
        """(B, N, C) and (B, M, C) -> (B, N, C)"""
        return self.ffn(self.norm(self.attention(queries, before, before, residual=queries)))

    def embedding(self, queries: Tensor) -> Tensor:
        """(N, C) -> (N, C)"""
        return self.head(self.embed(queries))


class TubeLinkPanoptic(TubeMaps):
    def __init__(self, settings: TubeLinkPanopticSettings) -> None:
        super().__init__(settings)
        self.linker = Linker(settings.hidden, settings.heads, settings.link_ffn)

    def maps(self, frames: list[PixelFeatures], state: TubeMapsState) -> tuple[Tensor, Tensor, list[int]]:
        clip = self.segment_clip(frames, state)
        return clip.labels, clip.classes, self.link(clip, state).instances

    def segment_clip(self, frames: list[PixelFeatures], state: TubeMapsState) -> TubePanoptic:
        """Every pixel goes to the query that leads there, if that has enough of its own mask."""
        tube, s = self.segment_tube(frames), self.settings
        scores, classes = tube.logits.softmax(-1).max(-1)
        kept = ((classes != s.classes) & (scores > s.object_threshold)).nonzero()[:, 0]
        scores, classes = scores[kept], classes[kept]
        found = [won_segments(tube.masks(t, kept), scores, state.size, s.overlap_threshold) for t in range(len(frames))]
        labels, listed = (torch.stack(part) for part in zip(*found))
        return TubePanoptic(labels, kept, classes, scores, listed, tube.queries)

    def link(self, clip: TubePanoptic, state: TubeMapsState) -> LinkedTube:
        """Identities of the tube's things. The first tube's queries are linked to nothing."""
        queries = clip.states
        if state.queries is not None:
            # As published: in inference every query attends to its own predecessor alone.
            queries = self.linker(queries[:, None], state.queries[:, None])[:, 0]
        state.queries = queries
        is_thing = clip.classes < len(self.settings.things)
        things = self._tracked_things(clip.listed & is_thing)
        instances = torch.where(is_thing, clip.queries + 1, 0).tolist()  # published: forgotten things keep numbers of the tube's own
        if not things:
            return LinkedTube(instances, queries, [], None, None)
        embeddings = self.linker.embedding(queries[clip.queries[things]]).float()
        last = torch.stack([clip.labels[-1] == s + 1 for s in things])
        tracked = track(state.tracks, clip.scores[things], last, embeddings, state.written, self.settings.tracker)
        which = range(len(things)) if self.settings.compat else tracked.kept.nonzero()[:, 0].tolist()
        found = dict(zip(which, tracked.ids))
        for i, segment in enumerate(things):
            instances[segment] = max(found.get(i, BACKDROP) + 1, 0)
        return LinkedTube(instances, queries, things, embeddings, tracked)

    def _tracked_things(self, listed: Tensor) -> list[int]:
        """Segments of (T, S) that are listed somewhere; as published, a frame without any makes the tube forget those before."""
        frames = listed.cpu()
        if self.settings.compat:
            empty = (~frames.any(1)).nonzero()[:, 0].tolist()
            frames = frames[empty[-1] + 1 :] if empty else frames
        return frames.any(0).nonzero()[:, 0].tolist()


def won_segments(masks: Tensor, scores: Tensor, size: FrameSize, share: float) -> tuple[Tensor, Tensor]:
    """Stride-4 masks (N, h, w), logits, and scores (N,) of one frame -> labels (H, W), 1 + the number of the mask or 0, and which of the
    masks count, (N,) bool: they lead in at least a `share` of the pixels inside of them. (Mask2Former's rule.)"""
    count = len(masks)
    labels = torch.zeros(size.source, dtype=torch.uint8 if count < 256 else torch.int16, device=masks.device)
    if not count:
        return labels, labels.new_zeros(0, dtype=torch.bool)
    own, won = torch.zeros(2, count, dtype=torch.int64, device=masks.device)
    for part, band in size.bands(masks):
        probability = band.sigmoid()
        inside = probability >= 0.5
        winner = probability.mul_(scores[:, None, None]).max(0).indices
        bits = pack_masks(inside)
        own += mask_overlap(bits, bits)[1]  # PyTorch's sum of bool takes three times as long
        won += torch.bincount(winner.flatten(), minlength=count)
        labels[part] = torch.where(inside.gather(0, winner[None])[0], winner + 1, 0).to(labels.dtype)
    counts = (won > 0) & (own > 0) & (won / own.clamp(min=1) >= share)
    table = torch.cat([counts.new_zeros(1), counts]) * torch.arange(count + 1, device=masks.device)
    return table.to(labels.dtype)[labels.int()], counts
