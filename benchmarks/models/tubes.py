# SPDX-License-Identifier: Apache-2.0
"""Tube-Link, panoptic, end to end on tubes, beside the published formulation: `python -m benchmarks.models.tubes`.

The published formulation is the network of `benchmarks.models.instances` in plain PyTorch, all frames of a tube at once; then the masks of
all queries of all frames at full size, a loop over the kept ones of every frame, dense masks for the tracker, and the ids written value by
value. Weights are random but fixed; the score that a query needs is set where 20 of 100 have it, which is more than a trained network keeps.
From frames in memory to panoptic maps; tracks are ours in either way.

Every way runs in a process of its own: the published one with the allocator as PyTorch leaves it, ours as `pyvseg run` sets it
(`keep_freed_memory`). "published, freed memory kept" shows what that setting alone would give. `python -m benchmarks.models.instances
--model tube_link_r50_ytvis19` times instances.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from torch import Tensor

from benchmarks.apart import Apart
from benchmarks.harness import machine
from benchmarks.models.instances import PUBLISHED, WAYS, Clock, How, network, table_of
from pyvseg import demo
from pyvseg.layers.inference import for_inference
from pyvseg.models.tube_link_maps import TubeMapsState
from pyvseg.models.tube_link_panoptic import TubeLinkPanoptic
from pyvseg.models.tube_link_tracker import track
from pyvseg.ops import _dispatch
from pyvseg.video.reader import open_video
from pyvseg.video.resize import resize_bilinear

MODEL, KEPT, SHARE = "tube_link_r50_vipseg", 20, 0.3  # random masks overlap
COMPARED = (PUBLISHED, "pyvseg float32", "pyvseg bfloat16")
OFFSET = 1000  # a published value is class + OFFSET * object


def published_tube(model: TubeLinkPanoptic, images: np.ndarray, state: TubeMapsState, clock: Clock) -> list[np.ndarray]:
    s, size = model.settings, state.size
    x = size.input(images, s.mean[::-1], s.std[::-1]).flip(1).contiguous()
    features = model.encode(x)
    *_, (states, queries) = model.decoder.states(features)
    with clock.stage("panoptic merge"):
        masks = torch.einsum("qc,tchw->tqhw", model.decoder.mask_embed(queries)[0], features.masks)
        scores, classes = model.decoder.class_embed(queries)[0].softmax(-1).max(-1)
        masks = F.interpolate(masks, size.padded, mode="bilinear", align_corners=False)
        found = [fuse(size.to_source(frame[None, :, : size.resized[0], : size.resized[1]])[0], scores, classes, model) for frame in masks]
    with clock.stage("linking"):
        state.queries = states[0] if state.queries is None else model.linker(states[0][:, None], state.queries[:, None])[:, 0]
        things = sorted({value for _, listed in found for value in listed})
        maps = [values for values, _ in found]
        if things:
            dense = torch.stack([torch.from_numpy(maps[-1] == value).float() for value in things]) > 0
            rows = torch.tensor([value // OFFSET - 1 for value in things])
            embeddings = model.linker.embedding(state.queries[rows])
            tracked = track(state.tracks, scores[rows], dense, embeddings, state.written, s.tracker)
            for t, before in enumerate(maps):
                maps[t] = before.copy()
                for value, name in zip(things, tracked.ids + [-1] * len(things)):
                    maps[t][before == value] = value % OFFSET + OFFSET * max(name + 1, 0)
    state.written += len(maps)
    return maps


def fuse(masks: Tensor, scores: Tensor, classes: Tensor, model: TubeLinkPanoptic) -> tuple[np.ndarray, list[int]]:
    """One frame's values and those of its things, of all queries' full-size masks."""
    s = model.settings
    keep = (classes != s.classes) & (scores > s.object_threshold)
    values, things, numbers = torch.full(masks.shape[1:], s.classes, dtype=torch.int32), [], keep.nonzero()[:, 0].tolist()
    masks, kept_scores, kept_classes = masks[keep].sigmoid(), scores[keep], classes[keep].tolist()
    winner = (kept_scores[:, None, None] * masks).argmax(0)
    for k, (number, category) in enumerate(zip(numbers, kept_classes)):
        own, inside = winner == k, masks[k] >= 0.5
        area, original = own.sum().item(), inside.sum().item()
        if not area or not original or area / original < s.overlap_threshold:
            continue
        is_thing = category < len(s.things)
        values[own & inside] = category + OFFSET * (number + 1) * is_thing
        things += [category + OFFSET * (number + 1)] if is_thing else []
    return values.numpy(), things


class Tubes:
    """A video's tubes in one way, one after the other: seconds, CPU seconds, seconds by stage."""

    @torch.inference_mode()
    def __init__(self, how: How, images: np.ndarray) -> None:
        self.ours, self.images, self.clock = how.inference is not None, images, Clock()
        model = network(MODEL, as_published=how.published)
        model.settings = replace(model.settings, short_side=None, overlap_threshold=SHARE, object_threshold=0.0)
        with _dispatch.backend("auto" if self.ours else "reference"):
            self.model = for_inference(model, how.inference) if self.ours else model
            model.settings = replace(model.settings, object_threshold=threshold(model, images))
        self.clock.watch_network(model)
        self.published = how.published
        if not self.published:
            model.segment_clip = self.clock.timed("panoptic merge", model.segment_clip)
            model.link = self.clock.timed("linking", model.link)
        self.state = model.new_state(*images.shape[1:3])

    @torch.inference_mode()
    def __call__(self) -> tuple[float, float, dict[str, float]]:
        self.clock.seconds.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        with _dispatch.backend("auto" if self.ours else "reference"), self.clock.stage("rest"):
            if self.published:
                published_tube(self.model, self.images, self.state, self.clock)
            else:
                for start in range(0, len(self.images), 2):
                    self.model.step(self.model.encode_frames(self.images[start : start + 2], self.state), self.state)
        return time.perf_counter() - wall, time.process_time() - cpu, dict(self.clock.seconds)


def threshold(model: TubeLinkPanoptic, images: np.ndarray) -> float:
    """The score that KEPT queries pass."""
    state = model.new_state(*images.shape[1:3])
    scores = model.segment_tube(model.encode_frames(images, state)).logits.softmax(-1)[:, :-1].amax(-1).sort(descending=True).values
    return scores[KEPT - 1 : KEPT + 1].mean().item()


def rows_of(images: np.ndarray, rounds: int, threads: int) -> dict[str, dict]:
    """The best run of each way."""
    rows = {}
    for group in (COMPARED, [name for name in WAYS if name not in COMPARED]):  # more processes would take too much memory
        ways = {name: Apart(Tubes, WAYS[name], images, threads=threads, keep_freed=WAYS[name].keep_freed) for name in group}
        runs = [{name: run() for name, run in ways.items()} for _ in range(rounds + 1)][1:]
        for name, run in ways.items():
            wall, _, stages = min((each[name] for each in runs), key=lambda found: found[0])
            rows[name] = {
                "seconds per frame": wall / len(images),
                "CPU seconds per frame": min(each[name][1] for each in runs) / len(images),
                "peak memory, MB": run.peak_memory() / 1e6,
                "shares": {stage: seconds / wall for stage, seconds in stages.items()},
            }
            run.close()
    return rows


def main(
    sizes: tuple[str, ...] = ("480x854", "720x1280"),
    rounds: int = 3,
    threads: int = 2,
    video: Path | None = None,
    out: Path | None = None,
) -> None:
    """Time Tube-Link (ResNet-50, VIPSeg) on tubes of 4 frames.

    Args:
        sizes: of the frames, HxW.
        rounds: every way runs once per round, in turn, and the best counts; the first does not.
        threads: of PyTorch.
        video: where the frames come from, resized; default: the demo's clip.
        out: write the figures as JSON.
    """
    torch.set_num_threads(threads)
    console, record = Console(width=150), {"machine": machine(threads), "model": MODEL, "tubes": {}}
    clip = torch.from_numpy(np.stack([frame.image for frame in open_video(video or demo.clip()).part(0, 4)]))
    for given in sizes:
        images = resize_bilinear(clip, tuple(map(int, given.split("x")))).numpy()
        rows = record["tubes"][given] = rows_of(images, rounds, threads)
        console.print(table_of(f"{MODEL}, {given}", rows))
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.models.tubes")
