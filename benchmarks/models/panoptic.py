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
from pyvseg.models.kmax_panoptic import PanopticSettings, panoptic_clip
from pyvseg.models.video_kmax import VideoKMaX, VideoKMaXSettings

clock = time.perf_counter
THINGS = tuple(range(58))
RULES = PanopticSettings(0.8, 0.3)  # of these random weights: about half of the queries, more than a trained network keeps


class Published:
    """One clip at a time."""

    def __init__(self, model: VideoKMaX, source: tuple[int, int]) -> None:
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

    def __init__(self, model: VideoKMaX, source: tuple[int, int]) -> None:
        self.model, self.state = model, model.new_state(*source)
        self.stages: dict[str, float] = {}
        self.waiting: list[FramePixels] = []

    def whole(self, images: Tensor) -> None:
        """A clip without anything kept from the one before."""
        self.merge(self.encode(images))

    def next(self, images: Tensor) -> None:
        """The clip that comes next in a video: where clips overlap, all but its first frame are new."""
        overlap = 1 if self.waiting and self.model.settings.clip_length > 1 else 0
        self.waiting = self.waiting[len(self.waiting) - overlap :] + self.encode(images[overlap:])
        self.merge(self.waiting)

    def encode(self, images: Tensor) -> list[FramePixels]:
        model = self.model
        features = self.timed("backbone", lambda: model.backbone(images.to(model.dtype)))
        maps = self.timed("pixel decoder", lambda: model.pixel_decoder(features))
        return self.timed("decoder, per frame", lambda: model.decoder.encode(maps)).split()

    def merge(self, pixels: list[FramePixels]) -> None:
        m, rules = self.model, self.model.settings.panoptic
        prediction, _ = self.timed("k-means", lambda: m.decoder(pixels))
        clip = self.timed("panoptic merge", lambda: panoptic_clip(prediction, 0, m.things, self.state.size, rules))
        self.timed("linking", lambda: m.link(clip, self.state))

    def timed(self, stage: str, run: Callable):
        start = clock()
        result = run()
        self.stages[stage] = self.stages.get(stage, 0.0) + clock() - start
        return result


@torch.no_grad()
def network(size: tuple[int, int], length: int) -> VideoKMaX:
    """Random weights behind batch norms that know their statistics; masks overlap as little as a trained network's."""
    torch.manual_seed(1)
    model = VideoKMaX(VideoKMaXSettings(things=THINGS, image_size=size, clip_length=length, panoptic=RULES, drop=0.0)).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.ones_(norm.weight)
    model.decoder([model.encode(torch.randn(2, 3, 97, 129))])
    larger = size[0] * size[1] * length / (2 * 97 * 129)
    for layer in model.decoder.layers:  # sums over positions
        layer.update_norm.running_mean *= larger
        layer.update_norm.running_var *= larger**2
    return model.eval()


@torch.inference_mode()
def against_published(size: tuple[int, int], source: tuple[int, int], rounds: int, bfloat16: bool) -> dict[str, dict[str, float]]:
    """Seconds of a clip of two frames by way and stage, the best of `rounds`, all ways in turn."""
    images = torch.randn(2, 3, *size)
    frames = images.contiguous(memory_format=torch.channels_last)
    published = Published(network(size, 2), source)
    dtypes = (("float32", torch.float32), ("bfloat16", torch.bfloat16))[: 1 + bfloat16]
    ours = {name: Ours(for_inference(network(size, 2), dtype), source) for name, dtype in dtypes}
    best: dict[str, dict[str, float]] = {}

    def keep(way: str, stages: dict[str, float]) -> None:
        if way not in best or sum(stages.values()) < sum(best[way].values()):
            best[way] = stages

    for _ in range(rounds):
        start = clock()
        prediction = published.network(images)
        middle = clock()
        published.merge(*prediction)
        keep("published", {"network": middle - start, "panoptic merge and stitching": clock() - middle})
        for name, clips in ours.items():
            for way, run in (("a clip alone", clips.whole), ("the next clip", clips.next)):
                clips.stages = {}
                if way == "the next clip" and not clips.waiting:
                    clips.next(frames)  # the first has nothing to build on
                    clips.stages = {}
                run(frames)
                keep(f"{name}, {way}", clips.stages)
    return best


@torch.inference_mode()
def by_clip_length(size: tuple[int, int], source: tuple[int, int], lengths: tuple[int, ...], rounds: int, dtype: torch.dtype) -> dict[int, float]:
    """Seconds for each new frame of a video."""
    images = torch.randn(max(lengths), 3, *size).contiguous(memory_format=torch.channels_last)
    clips = {length: Ours(for_inference(network(size, length), dtype), source) for length in lengths}
    best = dict.fromkeys(lengths, math.inf)
    for i in range(rounds + 1):  # the first round has nothing to build on
        for length, run in clips.items():
            start = clock()
            run.next(images[:length])
            if i:
                best[length] = min(best[length], (clock() - start) / max(length - 1, 1))
    return best


def main(
    sizes: tuple[str, ...] = ("481x865:480x854", "897x1601:720x1280"),
    lengths: tuple[int, ...] = (1, 2, 4, 6),
    rounds: int = 2,
    threads: int = 2,
    bfloat16: bool = True,
    cpu_time: bool = False,
    out: Path | None = None,
) -> None:
    """Time Video-kMaX (ResNet-50).

    Args:
        sizes: what the network is built for, and the video's own, HxW:HxW.
        lengths: clip lengths to time in float32 at the first size.
        rounds: every way runs once per round, the best counts.
        threads: of PyTorch.
        bfloat16: time the bfloat16 network too.
        cpu_time: seconds of all threads instead of the clock's, for a busy machine; set GOMP_SPINCOUNT=0, or waiting counts too.
        out: write the figures as JSON.
    """
    global clock
    clock = time.process_time if cpu_time else time.perf_counter
    keep_freed_memory()
    torch.set_num_threads(threads)
    console, record = Console(width=130), {"threads": threads, "clips": {}}
    for given in sizes:
        size, source = (tuple(map(int, part.split("x"))) for part in given.split(":"))
        rows = record["clips"][given] = against_published(size, source, rounds, bfloat16)
        title = f"Video-kMaX ResNet-50, a clip of two, network {size}, video {source}, {threads} threads{', CPU time' * cpu_time}"
        table = Table("way", "seconds", "times published", "stages", title=title)
        base = sum(rows["published"].values())
        for way, stages in rows.items():
            total = sum(stages.values())
            shares = ", ".join(f"{name} {seconds:.2f} s ({seconds / total:.0%})" for name, seconds in stages.items())
            table.add_row(way, f"{total:.2f}", f"{base / total:.1f}", shares)
        console.print(table)
    size, source = (tuple(map(int, part.split("x"))) for part in sizes[0].split(":"))
    record["seconds_per_frame"] = by_clip_length(size, source, lengths, rounds, torch.float32)
    console.print(f"seconds per frame by clip length, {sizes[0]}: " + ", ".join(f"{n}: {s:.2f}" for n, s in record["seconds_per_frame"].items()))
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.models.panoptic")
