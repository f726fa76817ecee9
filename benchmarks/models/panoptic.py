# SPDX-License-Identifier: Apache-2.0
"""Video-kMaX end to end on clips, beside the published formulation of the same network and of its panoptic merge:
`python -m benchmarks.models.panoptic`.

The published formulation is written from the paper's and the reports' description: batch norms as they stand, channels first, a
one-hot assignment and its dense product, predictions of every layer brought to stride 4, masks of all queries at full size in
float64, a loop over segments, and both frames of every clip computed anew. Weights are random; both run the same.

Every way runs in a process of its own: the published one with the allocator as PyTorch leaves it, ours as `pyvseg run` sets it
(`keep_freed_memory`). "published, freed memory kept" shows what that setting alone would give.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.apart import Apart, in_turn
from benchmarks.harness import machine
from pyvseg.layers.inference import for_inference
from pyvseg.layers.kmax_decoder import DecoderLayer, FramePixels
from pyvseg.layers.kmax_pixel_decoder import resize
from pyvseg.models.kmax_panoptic import PanopticSettings, panoptic_clip
from pyvseg.models.video_kmax import VideoKMaX, VideoKMaXSettings

THINGS = tuple(range(58))
BEHIND = ("panoptic merge and stitching", "panoptic merge", "linking")  # stages behind the network
RULES = PanopticSettings(0.98, 0.3)  # of these random weights: about half of the queries, more than a trained network keeps


class Stopwatch:
    """Adds up seconds by stage, by the clock or of all threads."""

    def __init__(self, cpu_time: bool) -> None:
        self.clock, self.stages = time.process_time if cpu_time else time.perf_counter, {}

    def __call__(self, stage: str, run: Callable):
        start = self.clock()
        result = run()
        self.stages[stage] = self.stages.get(stage, 0.0) + self.clock() - start
        return result


class Published:
    """One clip at a time."""

    def __init__(self, model: VideoKMaX, source: tuple[int, int], timed: Stopwatch) -> None:
        self.model, self.source, self.timed = model, source, timed
        self.state = model.new_state(*source)
        self.previous = np.zeros(source, np.int64)

    def next(self, images: Tensor) -> None:
        logits, masks = self.timed("network", lambda: self.network(images))
        self.timed("panoptic merge and stitching", lambda: self.merge(logits, masks))

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
    """Clips one after the other."""

    def __init__(self, model: VideoKMaX, source: tuple[int, int], timed: Stopwatch) -> None:
        self.model, self.state, self.timed = model, model.new_state(*source), timed
        self.waiting: list[FramePixels] = []

    def alone(self, images: Tensor) -> None:
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


@dataclass(frozen=True)
class How:
    """A way through a video: the published one or ours in some precision, and the process's allocator."""

    dtype: torch.dtype | None = None  # None: published
    keep_freed: bool = True

    @property
    def runs(self) -> dict[str, str]:
        """Ours comes as a clip alone and as the one after another."""
        return {"": "next"} if self.dtype is None else {", a clip alone": "alone", ", the next clip": "next"}


PUBLISHED = "published"
WAYS = {
    PUBLISHED: How(keep_freed=False),
    "float32": How(torch.float32),
    "bfloat16": How(torch.bfloat16),
    "published, freed memory kept": How(),
}


class Clips:
    """A process's way through a video: each call is one clip more; seconds by stage."""

    @torch.inference_mode()
    def __init__(self, how: How, size: tuple[int, int], source: tuple[int, int], length: int, cpu_time: bool) -> None:
        images = torch.randn(length, 3, *size)
        model, self.timed = network(size, length), Stopwatch(cpu_time)
        if how.dtype is None:
            self.clips, self.images = Published(model, source, self.timed), images
        else:
            self.clips = Ours(for_inference(model, how.dtype), source, self.timed)
            self.images = images.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, run: str) -> dict[str, float]:
        self.timed.stages.clear()
        getattr(self.clips, run)(self.images)
        return dict(self.timed.stages)


def against_published(size: tuple[int, int], source: tuple[int, int], rounds: int, threads: int, cpu_time: bool) -> dict[str, dict]:
    """Of a clip of two frames by way: seconds by stage, and bytes of memory at most."""
    rows = {}
    for group in ([*WAYS][:-1], [*WAYS][-1:]):  # a published way that keeps its memory leaves little for others
        ways = {name: Apart(Clips, WAYS[name], size, source, 2, cpu_time, threads=threads, keep_freed=WAYS[name].keep_freed) for name in group}
        runs = {name + more: partial(way, run) for name, way in ways.items() for more, run in WAYS[name].runs.items()}
        for name, stages in in_turn(runs, rounds).items():
            rows[name] = {"stages": stages, "peak memory, MB": runs[name].func.peak_memory() / 1e6}
        for way in ways.values():
            way.close()
    return rows


def by_clip_length(
    size: tuple[int, int], source: tuple[int, int], lengths: tuple[int, ...], rounds: int, threads: int, cpu_time: bool
) -> Iterator[tuple[int, float, float]]:
    """Clip length, seconds for a clip and for each new frame in it, in float32. Clips of several frames share one with the clip before."""
    ways = {str(n): Apart(Clips, How(torch.float32), size, source, n, cpu_time, threads=threads, keep_freed=True) for n in lengths}
    best = in_turn({name: partial(way, "next") for name, way in ways.items()}, rounds)
    for length, way in zip(lengths, ways.values()):
        way.close()
        seconds = sum(best[str(length)].values())
        yield length, seconds, seconds / max(length - 1, 1)


def main(
    sizes: tuple[str, ...] = ("481x865:480x854", "897x1601:720x1280"),
    lengths: tuple[int, ...] = (1, 2, 4, 6),
    rounds: int = 3,
    threads: int = 2,
    cpu_time: bool = False,
    out: Path | None = None,
) -> None:
    """Time Video-kMaX (ResNet-50).

    Args:
        sizes: what the network is built for, and the video's own, HxW:HxW.
        lengths: clip lengths to time in float32 at the first size.
        rounds: every way runs once per round, the best counts.
        threads: of PyTorch.
        cpu_time: seconds of all threads instead of the clock's, for a busy machine; set GOMP_SPINCOUNT=0, or waiting counts too.
        out: write the figures as JSON.
    """
    torch.set_num_threads(threads)
    console, record = Console(width=150), {"machine": machine(threads), "cpu_time": cpu_time, "clips": {}, "clip lengths": {}}
    for given in sizes:
        rows = record["clips"][given] = against_published(*_sizes(given), rounds, threads, cpu_time)
        console.print(_table(f"Video-kMaX ResNet-50, a clip of two, {given}, {threads} threads{', CPU time' * cpu_time}", rows))
    for length, clip, frame in by_clip_length(*_sizes(sizes[0]), lengths, rounds, threads, cpu_time):
        record["clip lengths"][length] = {"seconds per clip": clip, "seconds per new frame": frame}
        console.print(f"{sizes[0]}, clip length {length}: {clip:.2f} s per clip, {frame:.2f} s per new frame")
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")


def _sizes(given: str) -> list[tuple[int, int]]:
    return [tuple(map(int, part.split("x"))) for part in given.split(":")]


def _table(title: str, rows: dict[str, dict]) -> Table:
    table = Table("way", "seconds", "times published", "network alone", "MB", "stages", title=title)
    of_network = lambda stages: sum(s for name, s in stages.items() if name not in BEHIND)  # noqa: E731
    base = rows[PUBLISHED]["stages"]
    for way, row in rows.items():
        stages = row["stages"]
        total = sum(stages.values())
        shares = ", ".join(f"{name} {seconds:.3f} ({seconds / total:.0%})" for name, seconds in stages.items())
        ratios = [f"{of(base) / of(stages):.1f}x" for of in (lambda s: sum(s.values()), of_network)]
        table.add_row(way, f"{total:.2f}", *ratios, f"{row['peak memory, MB']:.0f}", shares)
    return table


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.models.panoptic")
