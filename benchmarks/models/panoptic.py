# SPDX-License-Identifier: Apache-2.0
"""Video-kMaX end to end on clips, beside the published formulation of the same network and of its panoptic merge:
`python -m benchmarks.models.panoptic`.

The published formulation is written from the paper's and the reports' description: batch norms as they stand, channels first, a
one-hot assignment and its dense product, predictions of every layer brought to stride 4, masks of all queries at full size in
float64, a loop over segments, and both frames of every clip computed anew. Weights are random; both run the same.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pyvseg.engine.allocator import keep_freed_memory
from pyvseg.layers.inference import for_inference
from pyvseg.layers.kmax_decoder import DecoderLayer, FramePixels
from pyvseg.layers.kmax_pixel_decoder import resize
from pyvseg.models.kmax_panoptic import PanopticSettings
from pyvseg.models.video_kmax import VideoKMaX, VideoKMaXSettings

THINGS = tuple(range(58))
RULES = PanopticSettings(0.02, 0.1)  # random weights are never sure; these keep about as many queries as a trained network does


class Published:
    """One clip at a time."""

    def __init__(self, model: VideoKMaX, source: tuple[int, int], frames: int) -> None:
        self.model, self.source = model, source
        self.state = model.new_state(*source)
        self.previous = np.zeros(source, np.int64)

    def clip(self, images: Tensor) -> np.ndarray:
        logits, masks = self.network(images)
        return self.merge(logits, masks)

    def network(self, images: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        *levels, finest = model.pixel_decoder(model.backbone(images))
        queries = model.decoder.cluster_centers.T[None]
        for layer, i in zip(model.decoder.layers, model.decoder.level):
            queries = self.layer(layer, levels[i], queries, finest.shape[2:])
        decoder = model.decoder
        classes, embeddings = decoder.class_embedding_projection(queries), decoder.mask_embedding_projection(queries)
        pixels = decoder.predictor.feature(decoder.predictor.hidden(finest))
        prediction = decoder.predictor([pixels], classes, embeddings)
        return prediction.logits[0], self.masks(decoder.predictor, prediction.kernels, F.normalize(pixels, dim=1))

    def layer(self, layer: DecoderLayer, level: Tensor, queries: Tensor, finest: torch.Size) -> Tensor:
        pixels = layer.pixel_in(F.gelu(level))
        before = layer.query_in(queries)
        value = layer.value(pixels).transpose(0, 1).flatten(1)
        prediction = layer.predictor([layer.predictor.feature(layer.predictor.hidden(pixels))], before, before)
        features = F.normalize(prediction.pixels[0], dim=1)
        logits = self.masks(layer.predictor, prediction.kernels, features)
        resize(logits, finest, finest[0]), resize(features, finest, finest[0])  # auxiliary outputs, thrown away at inference
        index = logits.transpose(0, 1).flatten(1).argmax(0, keepdim=True)
        one_hot = torch.zeros(logits.shape[1], index.shape[1]).scatter_(0, index, 1.0)
        update = torch.einsum("dm,nm->nd", value, one_hot)
        queries = queries + layer.update_out(layer.update_norm(update))[None]
        queries = F.gelu(queries + layer._attend(before))
        return F.gelu(queries + layer.ffn2(layer.ffn1(queries)))

    def masks(self, predictor: nn.Module, kernels: Tensor, features: Tensor) -> Tensor:
        products = torch.einsum("tchw,nc->tnhw", features, kernels[0])
        return predictor.mask_norm(products.flatten(0, 1)[:, None])[:, 0].view_as(products)

    def merge(self, logits: Tensor, masks: Tensor) -> np.ndarray:
        size = self.state.size
        masks = F.interpolate(masks, size.padded, mode="bilinear", align_corners=True)[..., : size.resized[0], : size.resized[1]]
        masks = F.interpolate(masks, self.source, mode="bilinear", align_corners=True)
        masks = torch.cat(list(masks), 1)  # frames below one another
        scores, labels = logits.softmax(-1)[:, :-1].max(-1)
        keep = (scores > RULES.object_threshold).double()[:, None, None]
        masks = masks * keep + -9999.0 * (1 - keep)
        winner, sure = masks.argmax(0), masks.softmax(0).max(0).values
        result, number, stuff = torch.zeros(masks.shape[1:], dtype=torch.int64), 0, {}
        for q in winner.unique().tolist():
            segment = (winner == q) & (sure > RULES.pixel_threshold)
            category = int(labels[q])
            if category in stuff:
                result[segment] = stuff[category]
                continue
            number += 1
            result[segment] = category * 10000 + number
            if category not in THINGS:
                stuff[category] = category * 10000 + number
        return self.stitch(result.numpy())

    def stitch(self, result: np.ndarray) -> np.ndarray:
        first, last = result[: self.source[0]], result[-self.source[0] :]
        for a in np.unique(self.previous)[1:]:
            for b in np.unique(first)[1:]:
                inside = ((self.previous == a) & (first == b)).sum()
                _ = 2 * inside / (((self.previous == a) | (first == b)).sum() + inside)
        for value in np.unique(result):
            result[result == value] = value
        self.previous = last
        return result


class Ours:
    """Clips one after the other; `stages` adds up seconds by part."""

    def __init__(self, model: VideoKMaX, source: tuple[int, int], frames: int) -> None:
        self.model, self.state, self.frames = model, model.new_state(*source), frames
        self.stages: dict[str, float] = {}
        self.waiting: list[FramePixels] = []

    def whole(self, images: Tensor) -> None:
        """A clip without anything kept from the one before."""
        self.timed("link", lambda: self.merge(self.encode(images)))

    def next(self, images: Tensor) -> None:
        """The clip that comes next in a video: all but its first frame are new."""
        self.waiting = self.waiting[-1:] + self.encode(images[1:] if self.waiting else images)
        self.merge(self.waiting)

    def encode(self, images: Tensor) -> list[FramePixels]:
        model = self.model
        features = self.timed("backbone", lambda: model.backbone(images.to(model.dtype)))
        maps = self.timed("pixel decoder", lambda: model.pixel_decoder(features))
        return self.timed("decoder, per frame", lambda: model.decoder.encode(maps)).split()

    def merge(self, pixels: list[FramePixels]) -> None:
        clip = self.timed("k-means and panoptic merge", lambda: self.model.segment_clip(pixels, self.state))
        self.timed("linking", lambda: self.model.link(clip, self.state))

    def timed(self, stage: str, run: Callable):
        start = time.perf_counter()
        result = run()
        self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - start
        return result
