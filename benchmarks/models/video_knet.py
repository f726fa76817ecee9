# SPDX-License-Identifier: Apache-2.0
"""Video K-Net for panoptic segmentation frame by frame, beside the published formulation of the same network and of its merge:
`python -m benchmarks.models.video_knet`.

The published formulation is written from the paper's and the reports' description: batch norms as they stand, channels first, masks as
zeros and ones multiplied with the features, masks of every stage brought to a half of the frame's size, those of the 100 best pairs and
of all stuff at full size, a loop over segments. Weights are random. What the last stage says is drawn instead, the same for all: a
random network knows one object or none, a trained one some dozens.

Every way runs in a process of its own: the published one with the allocator as PyTorch leaves it, ours as `pyvseg run` sets it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.apart import Apart, in_turn
from benchmarks.harness import machine
from benchmarks.models.panoptic import PUBLISHED, WAYS, How, Stopwatch
from pyvseg import ops
from pyvseg.layers.inference import for_inference
from pyvseg.layers.kernel_head import KernelHead, Refined
from pyvseg.models.categories import VIPSEG_THINGS
from pyvseg.models.knet_panoptic import FramePanoptic, Segment, merge
from pyvseg.models.video_knet import FrameSegments, VideoKNet, VideoKNetSettings, VideoKNetState, things_first

DATA = {
    "kitti_step": ((375, 1242), VideoKNetSettings()),
    "vipseg": ((720, 1280), VideoKNetSettings(124, 66, categories=things_first(VIPSEG_THINGS, 124))),
}


def drawn(settings: VideoKNetSettings, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Class and mask logits of the last stage, as a trained network's: things overlap little, most kernels have found nothing."""
    generator = torch.Generator().manual_seed(0)
    things, stuff = settings.kernels, settings.stuff
    height, width = (side // 8 for side in size)
    y, x = torch.arange(height)[:, None], torch.arange(width)
    centres = torch.rand(2, things + stuff, 1, 1, generator=generator)
    distance = ((y - centres[0] * height) ** 2 + (x - centres[1] * width) ** 2).float().sqrt()
    radius = height * (0.05 + 0.2 * torch.rand(things, 1, 1, generator=generator))
    masks = torch.cat([2 * (radius - distance[:things]), distance[things:].amin(0) - distance[things:] + 3])
    classes = torch.full((things + stuff, settings.classes), -6.0)
    found = settings.classes - stuff
    classes[range(20), torch.randint(found, (20,), generator=generator)] = 3 * torch.rand(20, generator=generator)
    classes[range(things, things + stuff), range(found, settings.classes)] = 3 * torch.rand(stuff, generator=generator) - 1
    return classes, masks + 0.3 * torch.randn(masks.shape, generator=generator)


class Published:
    """One frame at a time."""

    def __init__(self, model: VideoKNet, state: VideoKNetState, timed: Stopwatch, given: tuple[Tensor, Tensor]) -> None:
        self.model, self.state, self.timed, self.given = model, state, timed, given

    def next(self, images: Tensor) -> None:
        with ops.backend("reference"):
            refined, semantic = self.timed("network", lambda: self.network(images))
            panoptic = self.timed("panoptic merge", lambda: self.merge(semantic))
            self.timed("tracking and maps", lambda: self.track(FrameSegments(refined, panoptic)))

    def network(self, images: Tensor) -> tuple[Refined, Tensor]:
        model = self.model
        initial = model.initial
        localization, semantic = initial.fpn(model.fpn(model.backbone(images)))
        localization, semantic = initial.loc(localization), initial.seg(semantic)
        masks, logits = initial.kernels(localization), initial.classes(semantic)
        features, things = localization + semantic, initial.classes.out_channels - initial.stuff
        kernels = initial.kernels.weight[None, :, :, 0, 0] + torch.einsum("bnhw,bchw->bnc", (masks.sigmoid() > 0.5).float(), features)
        masks = torch.cat([masks, logits[:, things:]], 1)
        kernels = torch.cat([kernels, initial.classes.weight[None, things:, :, 0, 0]], 1)
        refined = None
        for i, stage in enumerate(model.stages):
            previous = self.state.kernels if i == len(model.stages) - 1 else None
            refined = self.stage(stage, features, kernels, masks, previous)
            kernels, masks = refined.kernels, refined.masks
            F.interpolate(masks, scale_factor=model.settings.upsample, mode="bilinear", align_corners=False)
        self.state.kernels = kernels
        return refined, logits

    def stage(self, stage: KernelHead, features: Tensor, kernels: Tensor, masks: Tensor, previous: Tensor | None) -> Refined:
        features = stage.feat_transform(features)
        pooled = torch.einsum("bnhw,bchw->bnc", (masks.sigmoid() > 0.5).float(), features)
        kernels = stage.refine(pooled, kernels)
        linked = kernels if previous is None else stage.link(kernels, previous, pooled)
        masks = F.conv2d(features, stage.fc_mask(stage.mask_fcs(kernels))[0, :, :, None, None])
        return Refined(stage.classify(kernels), masks, kernels, linked)

    def merge(self, semantic: Tensor) -> FramePanoptic:
        s, size = self.model.settings, self.state.size
        scores, masks = self.given[0].sigmoid(), F.interpolate(self.given[1][None], scale_factor=s.upsample, mode="bilinear")[0]
        things = s.classes - s.stuff
        best, pairs = scores[: s.kernels, :things].flatten().topk(s.merge.top)
        own, order = scores[s.kernels :, things:].diagonal().sort(descending=True)
        total, labels = torch.cat([best, own]), torch.cat([pairs % things, order + things])
        full = torch.cat([self.full(masks[pairs // things]), self.full(masks[order + s.kernels])])
        winner = (total[:, None, None] * full).argmax(0)
        result, segments = torch.zeros(size.source, dtype=torch.int32), []
        for k in total.argsort(descending=True).tolist():
            if labels[k] < things and total[k] < s.merge.score:
                continue
            mask = winner == k
            area, inside = mask.sum().item(), (full[k] >= 0.5).sum().item()
            if area and inside and area / inside >= s.merge.overlap:
                kernel = int(pairs[k] // things) if labels[k] < things else int(order[k - len(pairs)]) + s.kernels
                segments.append(Segment(int(labels[k]), bool(labels[k] < things), float(total[k]), kernel, k, area))
                result[mask] = len(segments)
        return FramePanoptic(result.numpy(), segments, self.boxes(result, segments, semantic))

    def boxes(self, result: Tensor, segments: list[Segment], semantic: Tensor) -> np.ndarray:
        things = self.model.settings.classes - self.model.settings.stuff
        kinds = F.interpolate(semantic, self.state.size.source, mode="bilinear").sigmoid().argmax(1)[0]
        boxes = []
        for i in (i for i, segment in enumerate(segments, 1) if segment.is_thing):
            rows, columns = ((result == i).float() * (kinds < things)).nonzero(as_tuple=True)
            boxes.append([columns.min(), rows.min(), columns.max(), rows.max()] if len(rows) else [-1, -1, 10, 10])
        return np.array(boxes, np.float32).reshape(-1, 4)

    def full(self, masks: Tensor) -> Tensor:
        size = self.state.size
        masks = F.interpolate(masks[None].sigmoid(), size.padded, mode="bilinear")[..., : size.resized[0], : size.resized[1]]
        return F.interpolate(masks, size.source, mode="bilinear")[0]

    def track(self, clip: FrameSegments) -> None:
        ids = iter(self.model.link(clip, self.state))
        labels, categories = clip.panoptic.labels, self.model.settings.categories
        tracks, kinds = np.zeros(labels.shape), np.zeros(labels.shape)
        for i, segment in enumerate(clip.panoptic.segments, 1):
            kinds[labels == i] = categories[segment.category]
            if segment.is_thing:
                tracks[labels == i] = next(ids)
        self.state.written += 1


class Ours:
    def __init__(self, model: VideoKNet, state: VideoKNetState, timed: Stopwatch, given: tuple[Tensor, Tensor]) -> None:
        self.model, self.state, self.timed, self.given = model, state, timed, given

    def next(self, images: Tensor) -> None:
        m, s = self.model, self.model.settings
        maps = self.timed("backbone", lambda: m.backbone(images.to(m.dtype)))
        maps = self.timed("feature pyramid", lambda: m.fpn(maps))
        frames = self.timed("first kernels", lambda: m.initial(maps))
        refined = self.timed("stages", lambda: self.stages(frames))
        scores, masks = self.given[0].sigmoid(), self.given[1].to(m.dtype)
        panoptic = self.timed("panoptic merge", lambda: merge(scores, masks, frames.semantic[0], self.state.size, s.stuff, s.upsample, s.merge))
        self.timed("tracking and maps", lambda: m._frame(FrameSegments(refined, panoptic), self.state))

    def stages(self, frames) -> Refined:
        for i, stage in enumerate(self.model.stages):
            previous = self.state.kernels if i == len(self.model.stages) - 1 else None
            refined = stage(frames.features, frames.kernels, frames.masks, previous)
            frames = frames._replace(kernels=refined.kernels, masks=refined.masks)
        self.state.kernels = refined.kernels
        return refined


class Frames:
    """A process's way through a video: each call is one frame more; seconds by stage."""

    @torch.inference_mode()
    def __init__(self, how: How, data: str, cpu_time: bool) -> None:
        source, settings = DATA[data]
        torch.manual_seed(0)
        model, self.timed = VideoKNet(settings).eval(), Stopwatch(cpu_time)
        state = model.new_state(*source)
        self.images = torch.randn(1, 3, *state.size.padded)
        given = drawn(settings, state.size.padded)
        if how.dtype is None:
            self.frames = Published(model, state, self.timed, given)
        else:
            self.frames = Ours(for_inference(model, how.dtype), state, self.timed, given)
            self.images = self.images.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self) -> dict[str, float]:
        self.timed.stages.clear()
        self.frames.next(self.images)
        return dict(self.timed.stages)


def main(data: tuple[str, ...] = ("kitti_step", "vipseg"), rounds: int = 3, threads: int = 2, cpu_time: bool = False, out: Path | None = None) -> None:
    """Time Video K-Net (ResNet-50).

    Args:
        data: kitti_step (375 x 1242, 19 classes), vipseg (720 x 1280, 124 classes).
        rounds: every way runs once per round, the best counts.
        threads: of PyTorch.
        cpu_time: seconds of all threads instead of the clock's, for a busy machine; set GOMP_SPINCOUNT=0, or waiting counts too.
        out: write the figures as JSON.
    """
    compare("Video K-Net ResNet-50", Frames, data, rounds, threads, cpu_time, out)


def compare(title: str, frames: type, data: tuple[str, ...], rounds: int, threads: int, cpu_time: bool, out: Path | None) -> None:
    """Prints the table of each kind of data, for `frames` like `Frames`."""
    console, record = Console(width=150), {"machine": machine(threads), "cpu_time": cpu_time, "frames": {}}
    for name in data:
        ways = {way: Apart(frames, how, name, cpu_time, threads=threads, keep_freed=how.keep_freed) for way, how in WAYS.items()}
        runs: dict[str, Callable] = {way: partial(process) for way, process in ways.items()}
        rows = {way: {"stages": stages, "peak memory, MB": ways[way].peak_memory() / 1e6} for way, stages in in_turn(runs, rounds).items()}
        for process in ways.values():
            process.close()
        record["frames"][name] = rows
        console.print(_table(f"{title}, a frame of {name}, {threads} threads{', CPU time' * cpu_time}", rows))
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")


def _table(title: str, rows: dict[str, dict]) -> Table:
    table = Table("way", "seconds", "times published", "MB", "stages", title=title)
    base = sum(rows[PUBLISHED]["stages"].values())
    for way, row in rows.items():
        total = sum(row["stages"].values())
        shares = ", ".join(f"{name} {seconds:.3f} ({seconds / total:.0%})" for name, seconds in row["stages"].items())
        table.add_row(way, f"{total:.2f}", f"{base / total:.1f}x", f"{row['peak memory, MB']:.0f}", shares)
    return table


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.models.video_knet")
