# SPDX-License-Identifier: Apache-2.0
"""TransVOD Lite (Zhou et al., TPAMI 2023): the objects of all frames of a clip at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyvseg.layers.deformable_detr import DecoderLayer, Grid, QueryLayer, box_head, class_head, moved
from pyvseg.models.frame_choice import groups
from pyvseg.models.video_detector import MINED, DetectionState, DetectorSettings, Encoded, FrameDetections, Prediction, VideoDetector


@dataclass(frozen=True)
class TransVODLiteSettings(DetectorSettings):
    """`clip_length`: T, frames that are seen together. `shuffle`: as published they come from all over the video."""

    clip_length: int = 12
    shuffle: bool = True


class Frames(NamedTuple):
    """What is kept of B frames, as in `layers.deformable_detr.Detections`."""

    memory: Tensor
    boxes: Tensor
    queries: Tensor


class TransVODLite(VideoDetector):
    """The network of one variant; see `TransVODLiteSettings`."""

    keep = Frames

    def __init__(self, settings: TransVODLiteSettings) -> None:
        super().__init__(settings)
        s = settings
        self.query_layers = nn.ModuleList(QueryLayer(s.hidden, s.heads, s.ffn) for _ in MINED)
        self.temporal_decoders = nn.ModuleList(DecoderLayer(s.hidden, s.heads, s.points, s.ffn) for _ in MINED)
        self.class_heads = nn.ModuleList(class_head(s.hidden, s.classes) for _ in MINED)
        self.box_heads = nn.ModuleList(box_head(s.hidden) for _ in MINED)
        for head in self.box_heads:
            nn.init.constant_(head.layers[-1].bias[2:], -2.0)

    def encode(self, images: Tensor) -> Encoded:
        found = self.detections(images)
        return Encoded(Frames(found.memory, found.boxes, found.queries), found.grid)

    def forward(self, images: Tensor) -> list[Prediction]:
        """Normalised images (T, 3, H, W) of a clip -> `fuse`."""
        return self.fuse(*self.encode(images))

    def fuse(self, frames: Frames, grid: Grid) -> list[Prediction]:
        """The T frames of a clip -> the final prediction (T, 30, ...), last, after those of the two rounds before it."""
        x, boxes, found = frames.queries, frames.boxes, []
        logits = self.detector.class_embed[-1](x)
        for count, layer, decoder, classes, head in zip(MINED, self.query_layers, self.temporal_decoders, self.class_heads, self.box_heads):
            best = mine(logits, count)[..., None]
            x, boxes = (part.gather(1, best.expand(-1, -1, part.shape[-1])) for part in (x, boxes))
            together = x.flatten(0, 1)[None]
            x = decoder(layer(together, together)[0].unflatten(0, x.shape[:2]), None, boxes, frames.memory, grid)
            logits = classes(x)
            found.append(Prediction(logits, moved(boxes, head(x))))
        return found

    def finish(self, state: DetectionState) -> Iterator[tuple[int, FrameDetections]]:
        done = set()
        for group in groups(state.frames, self.settings.clip_length, self.settings.shuffle):
            parts = zip(*(self.kept(state, t, *Frames._fields) for t in group))
            prediction = self.fuse(Frames(*map(torch.stack, parts)), state.grid)[-1]
            for t, result in zip(group, self.results(prediction, state.size.source)):
                if t not in done:
                    done.add(t)
                    yield t, result


def mine(logits: Tensor, count: int) -> Tensor:
    """logits (T, Q, K) -> positions (T, count) of each frame's queries that are likeliest to be of some class, best first."""
    return logits.float().sigmoid().amax(-1).topk(min(count, logits.shape[1])).indices
