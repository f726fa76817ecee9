# SPDX-License-Identifier: Apache-2.0
"""The transformer decoder of kMaX-DeepLab (Yu et al., ECCV 2022) and Video-kMaX (Shin et al., WACV 2024): cross-attention is one
step of k-means. The queries of a clip see the pixels of all its frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.kmax_predictor import WIDTH, Prediction, Predictor
from pyvseg.layers.normed import BATCH_NORM, LinearBN, ConvBN, batch_norm, drop_path
from pyvseg.ops import kmeans_assign, kmeans_attn, kmeans_pool

HEADS = 8


class LayerPixels(NamedTuple):
    """What one layer needs of a frame: features and what its masks are made of, both (B, 256, h, w)."""

    features: Tensor
    hidden: Tensor


class FramePixels(NamedTuple):
    """What the decoder needs of a frame. It does not depend on the clip: of overlapping clips it is computed once."""

    layers: list[LayerPixels]
    final: Tensor  # (B, 128, h, w)

    def split(self) -> list[FramePixels]:
        """Of frames encoded together, each."""
        layers = zip(*([LayerPixels(*pair) for pair in zip(*(x.split(1) for x in layer))] for layer in self.layers))
        return [FramePixels(list(own), final) for own, final in zip(layers, self.final.split(1))]


class LayerResult(NamedTuple):
    queries: Tensor  # (B, N, 256)
    assign: list[Tensor]  # of every frame, int32 (B, h, w): the query of each position
    prediction: Prediction | None  # where it was asked for
    masks: list[Tensor] | None  # its mask logits


class DecoderLayer(nn.Module):
    """One k-means step, self-attention of the queries as they were before it, and a feed-forward layer."""

    def __init__(self, inputs: int, classes: int, ffn: int, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.pixel_in, self.query_in = ConvBN(inputs, WIDTH, act=True), LinearBN(WIDTH, WIDTH, act=True)
        self.predictor = Predictor(WIDTH, classes)
        self.value = ConvBN(WIDTH, WIDTH)
        self.update_norm, self.update_out = nn.BatchNorm1d(WIDTH, **BATCH_NORM), LinearBN(WIDTH, WIDTH, init=0.0)
        self.qkv, self.similarity_norm = LinearBN(WIDTH, 2 * WIDTH), batch_norm(HEADS)
        self.retrieved_norm, self.attention_out = nn.BatchNorm1d(WIDTH, **BATCH_NORM), LinearBN(WIDTH, WIDTH, init=0.0)
        self.ffn1, self.ffn2 = LinearBN(WIDTH, ffn, act=True), LinearBN(ffn, WIDTH, init=0.0)

    def encode(self, activated: Tensor) -> LayerPixels:
        """A map after gelu, (B, inputs, h, w)."""
        features = self.pixel_in(activated)
        return LayerPixels(features, self.predictor.hidden(features))

    def forward(self, frames: Sequence[LayerPixels], queries: Tensor, predict: bool) -> LayerResult:
        """queries (B, N, 256); with `predict` classes and masks come too, as in training."""
        before = self.query_in(queries)
        prediction, masks = self._predict(frames, before) if predict else (None, None)
        update, assign = self._assign(frames, before) if masks is None else self._pool(frames, masks)
        queries = queries + self._drop(self.update_out(_rows(self.update_norm, update.to(queries.dtype))))
        queries = F.gelu(queries + self._drop(self._attend(before)))
        queries = F.gelu(queries + self._drop(self.ffn2(self.ffn1(queries))))
        return LayerResult(queries, assign, prediction, masks)

    def _predict(self, frames: Sequence[LayerPixels], queries: Tensor) -> tuple[Prediction, list[Tensor]]:
        prediction = self.predictor([self.predictor.feature(frame.hidden) for frame in frames], queries, queries)
        return prediction, self.predictor.dense_masks(prediction)

    def _assign(self, frames: Sequence[LayerPixels], queries: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Sums of the values of each query's positions (B, N, 256), and the assignment. In evaluation mode.

        Values are linear in the features, so these are summed and the 256x256 map is applied to the sums.
        """
        clusters, bias = (x.float() for x in self.predictor.clusters(queries))
        weight, shift = self.value.affine()
        updates, assign = [], [[] for _ in frames]
        for b in range(len(queries)):
            total, count = 0, 0
            for frame, found in zip(frames, assign):
                hidden, features = frame.hidden[b : b + 1], frame.features[b : b + 1]
                step = kmeans_attn(hidden, clusters[b : b + 1].to(hidden.dtype), features, bias=bias[b])
                total, count = total + step.update, count + step.count
                found.append(step.assign)
            updates.append(total @ weight.float().T + count[..., None] * shift.float())
        return torch.cat(updates), [torch.cat(found) for found in assign]

    def _pool(self, frames: Sequence[LayerPixels], masks: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The same as published. The gradient goes through the values only."""
        sizes = [m.shape[2] * m.shape[3] for m in masks]
        value = self.value(torch.cat([frame.features.flatten(2) for frame in frames], -1)[..., None])[..., 0]
        assign = kmeans_assign(torch.cat([m.flatten(2) for m in masks], -1))
        update = kmeans_pool(value, assign, masks[0].shape[1]).update
        return update, [a.unflatten(1, m.shape[2:]) for a, m in zip(assign.split(sizes, 1), masks)]

    def _attend(self, queries: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in self.qkv(queries).split((WIDTH // 2, WIDTH // 2, WIDTH), -1))
        weight = self.similarity_norm(q @ k.mT).float().softmax(-1).to(v.dtype)  # no 1 / sqrt(depth): the norm scales
        return self.attention_out(F.gelu(_rows(self.retrieved_norm, (weight @ v).transpose(1, 2).flatten(2))))

    def _drop(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop, self.training)


def _rows(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    return norm(x.flatten(0, 1)).view_as(x)


class Decoder(nn.Module):
    """channels: of the pixel decoder's four maps, coarsest first; `layers` of them look at each of the first three."""

    def __init__(self, channels: Sequence[int], layers: Sequence[int], *, classes: int, queries: int, ffn: int = 2048, drop: float = 0.0) -> None:
        super().__init__()
        *levels, final = channels
        self.cluster_centers = nn.Parameter(torch.empty(WIDTH, queries))
        nn.init.trunc_normal_(self.cluster_centers)
        self.level = [i for i, count in enumerate(layers) for _ in range(count)]  # of each layer
        self.layers = nn.ModuleList(DecoderLayer(levels[i], classes, ffn, drop) for i in self.level)
        self.class_embedding_projection, self.mask_embedding_projection = (LinearBN(WIDTH, WIDTH, act=True) for _ in range(2))
        self.predictor = Predictor(final, classes)

    def encode(self, maps: Sequence[Tensor]) -> FramePixels:
        """The pixel decoder's maps (B, C, h, w), coarsest first."""
        activated = [F.gelu(x) for x in maps[:-1]]
        layers = [layer.encode(activated[i]) for layer, i in zip(self.layers, self.level)]
        return FramePixels(layers, self.predictor.feature(self.predictor.hidden(maps[-1])))

    def forward(self, frames: Sequence[FramePixels], *, auxiliary: bool = False) -> tuple[Prediction, list[LayerResult]]:
        """The frames of B clips -> the prediction, and what every layer gave, with `auxiliary` also its classes and masks."""
        queries = self.cluster_centers.T.expand(len(frames[0].final), -1, -1)
        results = []
        for i, layer in enumerate(self.layers):
            results.append(layer([frame.layers[i] for frame in frames], queries, auxiliary or self.training))
            queries = results[-1].queries
        embeddings = self.class_embedding_projection(queries), self.mask_embedding_projection(queries)
        return self.predictor([frame.final for frame in frames], *embeddings), results
