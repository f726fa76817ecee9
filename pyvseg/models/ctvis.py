# SPDX-License-Identifier: Apache-2.0
"""CTVIS (Ying et al., ICCV 2023): frames segmented one by one, identities by embeddings and a memory bank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyvseg.layers.attention import MLP
from pyvseg.layers.pixel_decoder import PixelFeatures
from pyvseg.models.ctvis_tracker import Tracked, TrackerSettings, TrackerState, track
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.mask2former import Mask2Former, Mask2FormerSettings
from pyvseg.models.spool import MaskStore
from pyvseg.models.video_instances import Selection, VideoInstances, render


@dataclass(frozen=True)
class CTVISSettings(Mask2FormerSettings):
    """`embed_hidden`, `embed_layers`: the perceptron that gives identity embeddings."""

    embed_hidden: int = 256
    embed_layers: int = 3
    tracker: TrackerSettings = TrackerSettings()
    short_side: int | None = 480


class Detections(NamedTuple):
    """T frames: logits (T, Q, K + 1), masks (T, Q, h, w) and identity embeddings (T, Q, C)."""

    logits: Tensor
    masks: Tensor
    embeddings: Tensor


@dataclass
class CTVISState:
    size: FrameSize
    tracker: TrackerState = field(default_factory=TrackerState)
    masks: MaskStore = field(default_factory=MaskStore)  # by the records' keys


class CTVIS(Mask2Former):
    def __init__(self, settings: CTVISSettings) -> None:
        super().__init__(settings)
        self.reid_embed = MLP(settings.hidden, settings.embed_hidden, settings.hidden, settings.embed_layers)
        for layer in self.reid_embed.layers:
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def new_state(self, size: FrameSize) -> CTVISState:
        return CTVISState(size)

    framewise = True

    def per_frame(self, images: Tensor) -> Detections:
        return self.segment_clip(self.encode(images))

    def segment_clip(self, features: PixelFeatures, state: CTVISState | None = None) -> Detections:
        """Every frame of the clip on its own."""
        prediction = self.decoder(features)[-1]
        return Detections(prediction.logits, prediction.masks, self.reid_embed(prediction.queries))

    def link(self, clip: Detections, state: CTVISState) -> list[Tracked]:
        """Identities of every frame's detections."""
        return [self._link_frame(*frame, state) for frame in zip(*clip)]

    def _link_frame(self, logits: Tensor, masks: Tensor, embeddings: Tensor, state: CTVISState) -> Tracked:
        tracked = track(state.tracker, logits, masks, embeddings, self.settings.tracker)
        state.masks.append(masks[tracked.queries], tracked.keys)
        return tracked

    def probabilities(self, state: CTVISState) -> tuple[Tensor, list[int]]:
        """Of the classes for every record (N, K), and the records' keys."""
        records = list(state.tracker.records.values())
        means = torch.stack([r.mean_logits for r in records]) if records else torch.zeros(0, self.settings.classes + 1)
        return means.softmax(-1)[:, :-1], [record.key for record in records]

    def forget(self, state: CTVISState) -> None:
        """Drops what only the result of the whole video needs, for streams without end."""
        state.masks = MaskStore()
        tracker = state.tracker
        tracker.records = {name: record for name, record in tracker.records.items() if name in tracker.bank}  # the dead never return

    def finish(self, state: CTVISState, top: int | None = None, compat: bool = True) -> VideoInstances:
        """The tracks of the video so far, by default as many as there are classes, as published."""
        probabilities, names = self.probabilities(state)
        chosen = Selection.best(probabilities, top or self.settings.classes, names, compat=compat)
        return render(chosen, state.tracker.frame, state.size, state.masks.get, quality="source", device=self.device)
