# SPDX-License-Identifier: Apache-2.0
"""TransVOD (He et al., ACM MM 2021; Zhou et al., TPAMI 2023): the objects of a frame by the light of fourteen others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyvseg.layers.deformable_detr import DecoderLayer, Grid, QueryLayer, box_head, class_head, moved
from pyvseg.models.frame_choice import references
from pyvseg.models.video_detector import MINED, DetectionState, DetectorSettings, Encoded, FrameDetections, Prediction, VideoDetector


@dataclass(frozen=True)
class TransVODSettings(DetectorSettings):
    """`references`: R, other frames that each frame is seen with.

    fixed_temporal_sampling   for newly trained models only: queries of the temporal decoder look around their own boxes. In the
                              published ones they look around those of other queries, see `layers.deformable_detr.DecoderLayer`
    """

    references: int = 14
    fixed_temporal_sampling: bool = False


class Frames(NamedTuple):
    """What is kept of B frames: memory and boxes as in `layers.deformable_detr.Detections`, and

    current     (B, Q, C) queries as those of the frame whose objects are wanted
    reference   (B, Q, C) queries as those of another one
    scores      (B, Q, K) class probabilities of the queries, float32
    """

    memory: Tensor
    boxes: Tensor
    current: Tensor
    reference: Tensor
    scores: Tensor


class TransVOD(VideoDetector):
    """The network of one variant; see `TransVODSettings`."""

    keep = Frames
    DECODERS = 1

    def __init__(self, settings: TransVODSettings) -> None:
        super().__init__(settings)
        s = settings
        self.query_layers = nn.ModuleList(QueryLayer(s.hidden, s.heads, s.ffn) for _ in MINED)
        self.temporal_decoders = nn.ModuleList(DecoderLayer(s.hidden, s.heads, s.points, s.ffn) for _ in range(self.DECODERS))
        self.class_heads = nn.ModuleList(class_head(s.hidden, s.classes) for _ in range(self.DECODERS))
        self.box_heads = nn.ModuleList(box_head(s.hidden) for _ in range(self.DECODERS))
        for head in self.box_heads:
            nn.init.constant_(head.layers[-1].bias[2:], -2.0)

    def encode(self, images: Tensor) -> Encoded:
        found = self.detections(images)
        scores = self.detector.class_embed[-1](found.queries).float().sigmoid()
        return Encoded(Frames(found.memory, found.boxes, found.queries, found.queries, scores), found.grid)

    def forward(self, images: Tensor) -> list[Prediction]:
        """Normalised images (1 + R, 3, H, W), the current frame first -> its objects, `fuse`."""
        frames, grid = self.encode(images)
        others = (part[None, 1:].flatten(1, 2) for part in (frames.reference, frames.scores))
        return self.fuse(Frames(*(part[:1] for part in frames)), *others, grid)

    def fuse(self, frame: Frames, others: Tensor, scores: Tensor, grid: Grid) -> list[Prediction]:
        """One frame, the reference queries (1, R * Q, C) of the others and their scores (1, R * Q, K) -> the final prediction, last, after
        those of the rounds before it where the system has any."""
        x, found = frame.current, []
        decoders = dict(zip(range(len(MINED) - self.DECODERS, len(MINED)), zip(self.temporal_decoders, self.class_heads, self.box_heads)))
        spread = 1 if self.settings.fixed_temporal_sampling else others.shape[1] // self.settings.queries
        for i, (layer, chosen) in enumerate(zip(self.query_layers, mine(scores, self.settings.queries))):
            x = layer(x, others.gather(1, (chosen // scores.shape[-1])[..., None].expand(-1, -1, x.shape[-1])))
            if i in decoders:
                decoder, classes, boxes = decoders[i]
                x = decoder(x, None, frame.boxes, frame.memory, grid, spread=spread)
                found.append(Prediction(classes(x), moved(frame.boxes, boxes(x))))
        return found

    def finish(self, state: DetectionState) -> Iterator[tuple[int, FrameDetections]]:
        known: dict[int, list[Tensor]] = {}
        for t in range(state.frames):
            chosen = references(t, state.frames, self.settings.references)
            known = {i: known.get(i) or self.kept(state, i, "reference", "scores") for i in dict.fromkeys(chosen)}
            others, scores = (torch.cat([known[i][part] for i in chosen])[None] for part in (0, 1))
            frame = Frames(*(part[None] for part in self.kept(state, t, *Frames._fields)))
            yield t, self.results(self.fuse(frame, others, scores, state.grid)[-1], state.size.source)[0]


def mine(scores: Tensor, queries: int) -> list[Tensor]:
    """scores (B, R * Q, K) -> for each round the positions (B, N) of the likeliest (query, class) pairs, best first. A query that is
    likely to be of two classes is in it twice, and weighs twice."""
    frames = scores.shape[1] // queries
    flat = scores.flatten(1)
    best = flat.topk(min(MINED[0] * frames, flat.shape[1])).indices
    return [best[:, : count * frames] for count in MINED]
