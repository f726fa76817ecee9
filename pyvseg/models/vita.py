# SPDX-License-Identifier: Apache-2.0
"""VITA (Heo et al., NeurIPS 2022): a video is understood from the object tokens of its frames alone. Offline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyvseg.layers.packed import products
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.mask2former import Mask2Former, Mask2FormerSettings
from pyvseg.models.spool import Spool
from pyvseg.models.video_instances import Selection, VideoInstances, render
from pyvseg.models.vita_module import VideoModule


@dataclass(frozen=True)
class VITASettings(Mask2FormerSettings):
    """`queries` are those of a frame.

    video_*   queries, heads, feed-forward width, encoder and decoder layers of the video module
    window    frames that its encoder attends to together, 0: all
    top       tracks in a result: 10 for YouTube-VIS, 20 for OVIS
    """

    video_queries: int = 100
    video_heads: int = 8
    video_ffn: int = 2048
    video_encoder_layers: int = 6
    video_layers: int = 3
    window: int = 6
    top: int = 10


class FrameTokens(NamedTuple):
    """T frames: object tokens (T, fQ, C) and mask features (T, M, h, w)."""

    queries: Tensor
    masks: Tensor


@dataclass
class VITAState:
    """The frames so far: their tokens, and their mask features (h, w, M), which wait in a temporary file when they are many."""

    size: FrameSize
    queries: list[Tensor] = field(default_factory=list)
    masks: Spool = field(default_factory=Spool)


class VITA(Mask2Former):
    module = VideoModule

    def __init__(self, settings: VITASettings) -> None:
        super().__init__(settings)
        s = settings
        self.video = self.module(
            s.hidden, classes=s.classes, frame_queries=s.queries, queries=s.video_queries, heads=s.video_heads, hidden=s.video_ffn,
            encoder_layers=s.video_encoder_layers, layers=s.video_layers, inputs=s.width, mask_width=s.mask_width, window=s.window,
        )  # fmt: skip

    def new_state(self, size: FrameSize) -> VITAState:
        return VITAState(size)

    def encode(self, images: Tensor) -> FrameTokens:
        """Every frame on its own: the last layer's queries. The detector's own masks only steer its attention."""
        features = super().encode(images)
        *_, queries = self.decoder.refine(features)
        return FrameTokens(queries, self.video.vita_mask_features(features.finest))

    def segment_clip(self, features: FrameTokens, state: VITAState) -> FrameTokens:
        return features

    def link(self, clip: FrameTokens, state: VITAState) -> None:
        state.queries.append(clip.queries)
        for masks in clip.masks:
            state.masks.later(masks.permute(1, 2, 0))  # as they lie in memory

    def finish(self, state: VITAState, top: int | None = None, compat: bool = True) -> VideoInstances:
        """One pass of the video module over all frames; masks are made for the best queries only."""
        tokens = self.video.encode(torch.cat(state.queries)[None])
        queries = self.video.decoder_norm(self.video.decode(tokens)[-1])[0]
        probabilities = self.video.class_embed(queries).float().softmax(-1)[:, :-1]
        embeddings = self.video.mask_embed(queries).float()

        def logits_at(frame: int, objects: list[int]) -> tuple[list[int], Tensor]:
            masks = state.masks[frame].to(embeddings)
            logits = products(embeddings[None, objects], masks.flatten(0, 1).T[None])[0]
            return list(range(len(objects))), logits.unflatten(1, masks.shape[:2])

        chosen = Selection.best(probabilities, top or self.settings.top, compat=compat)
        return render(chosen, len(state.masks), state.size, logits_at, quality="resized", device=self.device)
