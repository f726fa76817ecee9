# SPDX-License-Identifier: Apache-2.0
"""Video instance segmentation end to end, beside the published formulation: `python -m benchmarks.models.instances --model NAME`.

The published formulation is the same network as its papers describe it, in plain PyTorch: frame by frame, channels first,
batch norms as they stand, deformable attention by `grid_sample`, attention by `nn.MultiheadAttention`'s function with one
mask per head, and after every layer the masks of all queries at stride 4, resized to the next level. From frames in memory
to tracks as RLE; tracker, upsampling and encoding are ours in either way. Weights are random but fixed, and spread so that
queries differ. On a machine that does other work too, OMP_WAIT_POLICY=passive and the ratio of CPU seconds say most.

Every way runs in a process of its own: the published one with the allocator as PyTorch leaves it, ours as `pyvseg run` sets it
(`keep_freed_memory`). "published, freed memory kept" shows what that setting alone would give, and "pyvseg, reference" is our
model as it is trained, every op on its PyTorch reference, frame by frame.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.apart import Apart
from benchmarks.harness import machine
from benchmarks.ops.ms_deform_attn import places, published
from pyvseg import demo
from pyvseg.engine.instances import InstanceSegmentation
from pyvseg.engine.types import Frame
from pyvseg.layers.attention import Attention
from pyvseg.layers.inference import for_inference
from pyvseg.layers.mask_decoder import MaskDecoder
from pyvseg.layers.pixel_decoder import PixelFeatures
from pyvseg.models.vita import VITA
from pyvseg.models.zoo import SYSTEMS, variant
from pyvseg.ops import MSDeformAttn, _dispatch
from pyvseg.video.reader import open_video
from pyvseg.video.resize import resize_bilinear

SIZE = (360, 640)


@dataclass(frozen=True)
class How:
    """A way to segment: the network, in which precision for inference or else as it is trained, and the process's allocator."""

    published: bool = False
    inference: torch.dtype | None = None
    keep_freed: bool = True


PUBLISHED = "published"
WAYS = {
    PUBLISHED: How(published=True, keep_freed=False),
    "published, freed memory kept": How(published=True),
    "pyvseg, reference": How(keep_freed=False),
    "pyvseg float32": How(inference=torch.float32),
    "pyvseg bfloat16": How(inference=torch.bfloat16),
}


class PublishedAttention(Attention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, masks: Tensor | None = None, *, residual: Tensor | None = None) -> Tensor:
        closed = None
        if masks is not None:
            closed = (masks.sigmoid() < 0.5)[:, None].expand(-1, self.heads, -1, -1).flatten(0, 1)
            closed = closed & ~closed.all(-1, keepdim=True)
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        out, _ = F.multi_head_attention_forward(
            query, key, value, query.shape[-1], self.heads, self.in_proj_weight, self.in_proj_bias, None, None, False, 0.0,
            self.out_proj.weight, self.out_proj.bias, training=False, attn_mask=closed,
        )  # fmt: skip
        return out.transpose(0, 1) if residual is None else residual + out.transpose(0, 1)


class PublishedDeformableAttention(MSDeformAttn):
    def attend(self, query: Tensor, points: Tensor, value: Tensor, shapes: list[tuple[int, int]], padding: Tensor | None) -> Tensor:
        value = self.value_proj(value).unflatten(-1, (self.n_heads, -1))
        grid = self.n_heads, self.n_levels, self.n_points
        offsets, logits = self.sampling_offsets(query).unflatten(-1, (*grid, 2)), self.attention_weights(query).unflatten(-1, grid)
        return self.output_proj(published(value, shapes, *places(shapes, points, offsets, logits)))


class PublishedDecoder(MaskDecoder):
    def states(self, features: PixelFeatures, *, clips: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        frames = self._frames(features, clips)
        memory = [self._memory(level, i, frames) for i, level in enumerate(features.levels)]
        maps = features.masks.unflatten(0, (-1, frames or 1))  # (B, T, M, h, w)
        x = self.query_feat.weight.expand(len(maps), -1, -1)
        for i, layer in enumerate(self.layers):
            queries = self.decoder_norm(x)
            yield x, queries
            self.class_embed(queries)
            masks = torch.einsum("bqc,btchw->bqthw", self.mask_embed(queries), maps)
            size = features.levels[i % self.scales].shape[-2:]
            small = F.interpolate(masks.flatten(0, 1), size, mode="bilinear", align_corners=False).unflatten(0, masks.shape[:2])
            x = layer(x, self.query_embed.weight, *memory[i % self.scales], small.flatten(2))
        yield x, self.decoder_norm(x)


PUBLISHED_MODULES = {Attention: PublishedAttention, MSDeformAttn: PublishedDeformableAttention, MaskDecoder: PublishedDecoder}


def network(name: str, *, as_published: bool = False) -> nn.Module:
    chosen = variant(name)
    torch.manual_seed(0)
    model = SYSTEMS[chosen.system].network(replace(chosen.settings, short_side=SIZE[0])).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, Attention):
            module.in_proj_weight *= 2  # attention that is sharp keeps queries apart
    for name, parameter in model.named_parameters():
        if name.endswith("mask_features.weight"):
            parameter -= parameter.mean(1, keepdim=True)  # masks of both signs: ReLU comes before
    for module in model.modules() if as_published else ():
        module.__class__ = PUBLISHED_MODULES.get(type(module), type(module))
    return model


class Clock:
    """Seconds by stage; the time of an inner stage is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._lap()
        self._running.append(name)
        try:
            yield
        finally:
            self._lap()
            self._running.pop()

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] = self.seconds.get(self._running[-1], 0.0) + now - self._since
        self._since = now

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            with self.stage(name):
                return function(*args, **kwargs)

        return call

    def steps(self, name: str, generate: Callable) -> Callable:
        def call(*args, **kwargs):
            generator, end = generate(*args, **kwargs), object()
            while True:
                with self.stage(name):
                    item = next(generator, end)
                if item is end:
                    return
                yield item

        return call

    def watch_network(self, model: nn.Module) -> None:
        model.backbone.forward = self.timed("backbone", model.backbone.forward)
        model.pixel_decoder.forward = self.timed("pixel decoder", model.pixel_decoder.forward)
        model.decoder.states = self.steps("decoder", model.decoder.states)

    def watch(self, model: nn.Module) -> None:
        self.watch_network(model)
        model.decoder.predict = self.timed("decoder", model.decoder.predict)
        if isinstance(model, VITA):
            for method in ("encode", "decode"):
                setattr(model.video, method, self.timed("video module", getattr(model.video, method)))
        model.link = self.timed("association", model.link)
        model.finish = self.timed("upsampling, encoding", model.finish)


class Segmenting:
    """Frames to tracks in one way: seconds, CPU seconds, seconds by stage."""

    def __init__(self, how: How, model: str, images: np.ndarray) -> None:
        self.ours, self.images = how.inference is not None, images
        self.model = network(model, as_published=how.published)
        if self.ours:
            for_inference(self.model, how.inference)
        self.clock = Clock()
        self.clock.watch(self.model)

    @torch.inference_mode()
    def __call__(self) -> tuple[float, float, dict[str, float]]:
        self.clock.seconds.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        with _dispatch.backend("auto" if self.ours else "reference"), self.clock.stage("frames, kept masks"):
            segmentation = InstanceSegmentation(self.model)
            if not self.ours:
                segmentation.frames_per_step = segmentation.clip_length or getattr(self.model.settings, "tube", 1)
            for i, image in enumerate(self.images):
                segmentation.step(Frame(i, image, str(i)))
            segmentation.finish()
        return time.perf_counter() - wall, time.process_time() - cpu, dict(self.clock.seconds)


def rows_of(model: str, images: np.ndarray, rounds: int, threads: int) -> dict[str, dict]:
    """The best run of each way."""
    ways = {name: Apart(Segmenting, how, model, images, threads=threads, keep_freed=how.keep_freed) for name, how in WAYS.items()}
    runs = [{name: run() for name, run in ways.items()} for _ in range(rounds)]
    rows = {}
    for name, run in ways.items():
        wall, cpu, stages = min((each[name] for each in runs), key=lambda found: found[0])
        rows[name] = {
            "seconds per frame": wall / len(images),
            "CPU seconds per frame": cpu / len(images),
            "peak memory, MB": run.peak_memory() / 1e6,
            "shares": {stage: seconds / wall for stage, seconds in stages.items()},
        }
        run.close()
    return rows


@torch.inference_mode()
def predictions(model: nn.Module, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Class probabilities (..., K + 1) and mask logits at stride 4 of all queries."""
    segmentation = InstanceSegmentation(model)
    for i, image in enumerate(images):
        segmentation.add(Frame(i, image, str(i)))
    x = segmentation.input()
    if not isinstance(model, VITA):
        last = model(x)[-1]
        return last.logits.float().softmax(-1), last.masks.float()
    tokens = model.encode(x)
    queries = model.video.decoder_norm(model.video.decode(model.video.encode(tokens.queries[None]))[-1])[0]
    masks = model.video.mask_embed(queries) @ tokens.masks.flatten(2)
    return model.video.class_embed(queries).float().softmax(-1), masks.float()


def deviation(name: str, images: np.ndarray) -> dict[str, float]:
    """Of bfloat16 from float32, over all queries: pixels whose mask differs, mean and largest change of a class probability."""
    (p, m), (q, n) = (predictions(for_inference(network(name), dtype), images) for dtype in (torch.float32, torch.bfloat16))
    return {
        "mask pixels that differ, %": 100 * ((m > 0) != (n > 0)).float().mean().item(),
        "set mask pixels, %": 100 * (m > 0).float().mean().item(),
        "mean change of a probability": (p - q).abs().mean().item(),
        "largest change of a probability": (p - q).abs().max().item(),
    }


def main(
    model: tuple[str, ...] = ("minvis_r50_ytvis19", "ctvis_r50_ytvis19"),
    video: Path | None = None,
    frames: int = 8,
    rounds: int = 2,
    threads: int = 2,
    out: Path | None = None,
) -> None:
    """Time video instance segmentation at 360 x 640.

    Args:
        model: names of `pyvseg models`, one after the other.
        video: where the frames come from, resized; default: the demo's clip.
        frames: how many.
        rounds: every way runs once per round, in turn, and the best counts.
        threads: of PyTorch.
        out: write the figures as JSON.
    """
    torch.set_num_threads(threads)
    images = np.stack([frame.image for frame in open_video(video or demo.clip()).part(0, frames)])
    images = resize_bilinear(torch.from_numpy(images), SIZE).numpy()
    record = {"machine": machine(threads), "size": SIZE, "frames": frames, "models": {}}
    console = Console(width=140)
    for name in model:
        rows = rows_of(name, images, rounds, threads)
        record["models"][name] = {**rows, "bfloat16 deviates": deviation(name, images[:4])}
        console.print(table_of(f"{name}: seconds per frame", rows), record["models"][name]["bfloat16 deviates"])
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")


def table_of(title: str, rows: dict[str, dict]) -> Table:
    table = Table(title=title)
    stages = list(rows[PUBLISHED]["shares"])
    for column in ("way", "seconds", "ratio", "CPU ratio", "MB", *stages):
        table.add_column(column, justify="left" if column == "way" else "right")
    base = rows[PUBLISHED]
    for way, row in rows.items():
        ratios = [f"{base[key] / row[key]:.2f}x" for key in ("seconds per frame", "CPU seconds per frame")]
        shares = (f"{100 * row['shares'].get(stage, 0):.0f} %" for stage in stages)
        table.add_row(way, f"{row['seconds per frame']:.3f}", *ratios, f"{row['peak memory, MB']:.0f}", *shares)
    return table


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.models.instances")
