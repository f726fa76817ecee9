# SPDX-License-Identifier: Apache-2.0
"""Video object detection end to end, beside the published formulation: `python -m benchmarks.models.detection --model NAME`.

The published formulation sends a frame with all its references (TransVOD Lite: a clip) through the network together, in plain PyTorch:
channels first, batch norms as they stand, deformable attention by `grid_sample`, attention by `nn.MultiheadAttention`'s function. So
every frame passes fifteen times through it, once for each frame that it is seen with; "published, every frame once" is what remains
of it if that is spared. From frames in memory to boxes. Weights are random but fixed. On a machine that does other work too,
OMP_WAIT_POLICY=passive and the ratio of CPU seconds say most.

Every way runs in a process of its own: the published ones with the allocator as PyTorch leaves it, or as `pyvseg run` sets it, which is ours.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.apart import Apart
from benchmarks.harness import machine
from benchmarks.models.instances import PUBLISHED_MODULES, SIZE, PublishedDeformableAttention
from benchmarks.ops.ms_deform_attn import published
from pyvseg import demo
from pyvseg.engine.detection import ObjectDetection
from pyvseg.engine.types import Frame
from pyvseg.layers.inference import for_inference
from pyvseg.models.video_detector import VideoDetector
from pyvseg.models.zoo import SYSTEMS, variant
from pyvseg.ops import MSDeformAttn, _dispatch
from pyvseg.video.reader import open_video
from pyvseg.video.resize import resize_bilinear

PUBLISHED = "published"


@dataclass(frozen=True)
class How:
    """A way to detect: `inference` is the precision of ours, None the network as published; `together` as published; `keep_freed` as in `Apart`."""

    inference: torch.dtype | None = None
    together: bool = False
    keep_freed: bool = True


WAYS = {
    PUBLISHED: How(together=True, keep_freed=False),
    "published, freed memory kept": How(together=True),
    "published, every frame once": How(),
    "pyvseg float32": How(torch.float32),
    "pyvseg bfloat16": How(torch.bfloat16),
}


class PublishedBoxAttention(PublishedDeformableAttention):
    def attend(self, query: Tensor, points: Tensor, value: Tensor, shapes: list[tuple[int, int]], padding: Tensor | None) -> Tensor:
        if points.shape[-1] == 2:
            return super().attend(query, points, value, shapes, padding)
        value = self.value_proj(value).unflatten(-1, (self.n_heads, -1))
        grid = self.n_heads, self.n_levels, self.n_points
        offsets, logits = self.sampling_offsets(query).unflatten(-1, (*grid, 2)), self.attention_weights(query).unflatten(-1, grid)
        boxes = points[:, :, None, :, None]
        locations = boxes[..., :2] + offsets / self.n_points * boxes[..., 2:] * 0.5
        return self.output_proj(published(value, shapes, locations, logits.flatten(3).softmax(-1).view_as(logits)))


MODULES = {**PUBLISHED_MODULES, MSDeformAttn: PublishedBoxAttention}


def network(name: str, *, as_published: bool) -> VideoDetector:
    chosen = variant(name)
    torch.manual_seed(0)
    model = SYSTEMS[chosen.system].network(chosen.settings).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        module.__class__ = MODULES.get(type(module), type(module)) if as_published else type(module)
    return model


class Detecting:
    """Frames to boxes in one way: seconds and CPU seconds per frame."""

    def __init__(self, how: How, name: str, images: np.ndarray) -> None:
        self.how, self.images = how, images
        self.model = network(name, as_published=how.inference is None)
        if how.inference is not None:
            for_inference(self.model, how.inference)

    @torch.inference_mode()
    def __call__(self) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        with _dispatch.backend("reference" if self.how.inference is None else "auto"):
            frames = self._together() if self.how.together else self._once()
        return (time.perf_counter() - wall) / frames, (time.process_time() - cpu) / frames

    def _together(self) -> int:
        """One frame with its references, or one clip."""
        s = self.model.settings
        seen = getattr(s, "clip_length", 0) or 1 + s.references
        size = self.model.new_state(*self.images.shape[1:3]).size
        x = size.input(self.images[np.arange(seen) % len(self.images)], s.mean, s.std).contiguous()
        prediction = self.model(x)[-1]
        return len(self.model.results(prediction, size.source))

    def _once(self) -> int:
        detection = ObjectDetection(self.model)
        frames = [Frame(i, image, str(i)) for i, image in enumerate(self.images)]
        for start in range(0, len(frames), detection.frames_per_step):
            detection.step(frames[start : start + detection.frames_per_step])
        return len(detection.finish())


def rows_of(model: str, images: np.ndarray, rounds: int, threads: int) -> dict[str, dict]:
    """The best run of each way."""
    rows = {}
    for name, how in WAYS.items():
        run = Apart(Detecting, how, model, images, threads=threads, keep_freed=how.keep_freed)
        seconds, cpu = min(run() for _ in range(rounds))
        rows[name] = {"seconds per frame": seconds, "CPU seconds per frame": cpu, "peak memory, MB": run.peak_memory() / 1e6}
        run.close()
    return rows


def main(
    model: tuple[str, ...] = ("transvod_r50_vid", "transvod_lite_swin_b_vid"),
    video: Path | None = None,
    frames: int = 12,
    rounds: int = 2,
    threads: int = 2,
    out: Path | None = None,
) -> None:
    """Time video object detection of 360 x 640 frames, at the published size of 562 x 999.

    Args:
        model: names of `pyvseg models`, one after the other.
        video: where the frames come from, resized; default: the demo's clip.
        frames: how many.
        rounds: so often every way runs, and the best counts.
        threads: of PyTorch.
        out: write the figures as JSON.
    """
    images = np.stack([frame.image for frame in open_video(video or demo.clip()).part(0, frames)])
    images = resize_bilinear(torch.from_numpy(images), SIZE).numpy()
    size = network(model[0], as_published=False).new_state(*images.shape[1:3]).size
    record = {"machine": machine(threads), "size": size.resized, "frames": frames, "models": {}}
    console = Console(width=140)
    for name in model:
        record["models"][name] = rows_of(name, images, rounds, threads)
        console.print(_table(name, record["models"][name]))
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")


def _table(name: str, rows: dict[str, dict]) -> Table:
    table = Table(title=f"{name}: seconds per frame")
    for column in ("way", "seconds", "ratio", "CPU ratio", "MB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    base = rows[PUBLISHED]
    for way, row in rows.items():
        ratios = [f"{base[key] / row[key]:.2f}x" for key in ("seconds per frame", "CPU seconds per frame")]
        table.add_row(way, f"{row['seconds per frame']:.3f}", *ratios, f"{row['peak memory, MB']:.0f}")
    return table


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.models.detection")
