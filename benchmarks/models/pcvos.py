# SPDX-License-Identifier: Apache-2.0
"""PCVOS end to end on a clip, beside the published formulation of the same network: `python -m benchmarks.models.pcvos`.

The published formulation is written from the paper's description: batch norms as they stand, channels first, and for
every object its own affinity, dense readout, refinement and decoder, nothing shared. Weights are random; both run the same.

Every way runs in a process of its own: the published one with the allocator as PyTorch leaves it, ours as `pyvseg run` sets it
(`keep_freed_memory`). "published, freed memory kept" shows what that setting alone would give.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.apart import Apart, in_turn
from benchmarks.harness import machine
from pyvseg.layers.inference import for_inference
from pyvseg.models.memory import aggregate
from pyvseg.models.stcn import STCN, STCNSettings

HEIGHT, WIDTH, PADDED = 480, 854, 864


class Published:
    """Keeps one bank per object, as lists of channels-first tensors."""

    def __init__(self, model: STCN, frames: Tensor, masks: Tensor, memory_frames: int) -> None:
        self.model = model
        f16 = model.key_encoder(frames[:1])[-1]
        key = model.key_proj(f16)[0].flatten(1)
        values = self.values(frames[0], masks, f16[0])
        self.keys = [key.repeat(1, memory_frames) + 0.1 * torch.randn(key.shape[0], key.shape[1] * memory_frames) for _ in masks]
        self.values_ = [v.flatten(1).repeat(1, memory_frames) for v in values]

    def clip(self, frames: Tensor) -> Tensor:
        """Segment a clip and value-encode its last frame."""
        m = self.model
        f4, f8, f16 = m.key_encoder(frames)
        keys, thin, refine = m.key_proj(f16), m.key_comp(f16), m.icr_proj(f16)
        logits = []
        for key, value in zip(self.keys, self.values_):
            readout = torch.stack([self.read(key, value, q.flatten(1)).view(-1, *q.shape[1:]) for q in keys])
            maps = m.icr.attention(refine.permute(0, 2, 3, 1)[None])
            refined = m.icr(readout.permute(0, 2, 3, 1)[None, None], maps)[0, 0].permute(0, 3, 1, 2).contiguous()
            logits.append(self.decode(refined, thin, f8, f4))
        probabilities = aggregate(torch.stack(logits).sigmoid())
        self.values(frames[-1], probabilities[1:, -1], f16[-1])
        return probabilities

    def read(self, key: Tensor, value: Tensor, query: Tensor) -> Tensor:
        similarity = (2 * key.T @ query - key.square().sum(0)[:, None]) / math.sqrt(key.shape[0])
        best, index = similarity.topk(self.model.settings.top_k, dim=0)
        weight = torch.zeros_like(similarity).scatter_(0, index, best.exp() / best.exp().sum(0))
        return value @ weight

    def fuse(self, block, object_part: Tensor, frame_part: Tensor) -> Tensor:
        x = torch.cat([object_part, frame_part], 1)
        inner = F.conv2d(x.relu(), block.conv1.weight, block.conv1.bias, padding=1)
        return F.conv2d(x, block.downsample.weight, block.downsample.bias, padding=1) + block.conv2(inner.relu())

    def decode(self, readout: Tensor, thin: Tensor, f8: Tensor, f4: Tensor) -> Tensor:
        d = self.model.decoder
        x = self.fuse(d.compress, readout, thin)
        for up, skip in ((d.up_16_8, f8), (d.up_8_4, f4)):
            x = up(x, up.skip_conv(skip))
        logits = d.pred(x.relu())
        return F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)[:, 0]

    def values(self, image: Tensor, masks: Tensor, f16: Tensor) -> Tensor:
        encoder = self.model.value_encoder
        planes = torch.stack([masks, masks.sum(0) - masks], 1)
        x = encoder.trunk(torch.cat([image.expand(len(masks), -1, -1, -1), planes], 1))[-1]
        x = self.fuse(encoder.fuser.block1, x, f16.expand(len(masks), -1, -1, -1))
        return encoder.fuser.block2(x + encoder.fuser.attention(x))


class Ours:
    def __init__(self, model: STCN, frames: Tensor, masks: Tensor, memory_frames: int) -> None:
        self.model, self.indices = model, list(range(1, 1 + len(frames)))
        self.state = model.new_state(memory_frames)
        features = model.encode(frames[:1])
        model.annotate(features, 0, {i + 1: m for i, m in enumerate(masks)}, None, self.state)
        for i in range(1, memory_frames):
            key = features.keys[0] + 0.1 * torch.randn_like(features.keys[0])
            self.state.remember(-1000 + i, key, model.encode_values(features, 0, masks), annotated=False)

    def clip(self, frames: Tensor) -> Tensor:
        features = self.model.encode(frames)
        probabilities = self.model.segment_clip(features, self.state)
        self.state.last_memory = 0
        self.model.link(features, self.indices, probabilities, self.state, clip_length=len(frames), closed=False)
        return probabilities


@torch.inference_mode()
def clip_run(precision: str, objects: int, clip: int, memory_frames: int) -> Callable[[], float]:
    """What runs one clip, "published" or ours in a precision, and returns its seconds per frame."""
    torch.manual_seed(0)
    frames = F.pad(torch.randn(clip, 3, HEIGHT, WIDTH), (5, 5))
    masks = (torch.rand(objects, 1, HEIGHT // 32, PADDED // 32) > 0.7).float()
    masks = F.interpolate(masks, (HEIGHT, PADDED))[:, 0]
    if precision == "published":
        way = Published(_network(), frames, masks, memory_frames)
    else:
        way = Ours(for_inference(_network(), getattr(torch, precision)), frames, masks, memory_frames)
        frames = frames.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run() -> float:
        start = time.perf_counter()
        way.clip(frames)
        return (time.perf_counter() - start) / clip

    return run


def compare(ways: dict[str, tuple[str, bool]], problem: tuple[int, int, int], rounds: int, threads: int) -> dict[str, float]:
    """Seconds per frame (the best of `rounds`, all ways in turn) by way."""
    runs = {name: Apart(clip_run, precision, *problem, threads=threads, keep_freed=keep) for name, (precision, keep) in ways.items()}
    best = in_turn(runs, rounds, cost=float, warm_up=1)
    for run in runs.values():
        run.close()
    return best


def _network() -> STCN:
    torch.manual_seed(1)
    model = STCN(STCNSettings()).eval().requires_grad_(False)
    model.key_proj.weight *= 0.2  # keeps the exponentials of the published read finite
    return model


def main(
    objects: tuple[int, ...] = (2, 5),
    clip: int = 5,
    memory_frames: int = 6,
    rounds: int = 2,
    threads: int = 2,
    bfloat16: bool = True,
    out: Path | None = None,
) -> None:
    """Time PCVOS (ResNet-50) at 480 x 854.

    Args:
        objects: numbers of objects to time, one table row each.
        clip: frames per clip; one of them is value encoded.
        memory_frames: frames in memory.
        rounds: every way runs once per round, the best counts.
        threads: of PyTorch.
        bfloat16: time the bfloat16 network too.
        out: write the figures as JSON.
    """
    ways = {"published": ("published", False), "published, freed memory kept": ("published", True), "pyvseg float32": ("float32", True)}
    if bfloat16:
        ways["pyvseg bfloat16"] = "bfloat16", True
    sizes = f"{HEIGHT}x{WIDTH}, clip {clip}, {memory_frames} memory frames, {threads} threads"
    table = Table("objects", *ways, title=f"PCVOS ResNet-50, {sizes}: seconds per frame")
    rows = {}
    for count in objects:
        rows[count] = compare(ways, (count, clip, memory_frames), rounds, threads)
        base = rows[count]["published"]
        table.add_row(str(count), *(f"{s:.3f} ({base / s:.2f}x)" for s in rows[count].values()))
    Console(width=110).print(table)
    if out:
        record = {"machine": machine(threads), "clip": clip, "memory_frames": memory_frames, "seconds_per_frame": rows}
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.models.pcvos")
