# SPDX-License-Identifier: Apache-2.0
"""`pyvseg batch` against a plain loop, and accuracy beside speed by clip length: `python -m benchmarks.batch --data DAVIS`.

The plain loop is what one writes first: read a frame, run the network on it, write its mask, overlay and RLE. It has the network,
readers, writers and threads of the batch; only the engine is missing. `plain PyTorch` is the same loop with the network as it is
defined, in PyTorch's own operations: norms not folded, no kernels of ours.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn

from pyvseg import checkpoints, ops
from pyvseg.datasets.davis import Davis
from pyvseg.engine.allocator import keep_freed_memory
from pyvseg.engine.batch import batch
from pyvseg.engine.jobs import Job
from pyvseg.engine.propagate import Propagation
from pyvseg.engine.recipe import Recipe
from pyvseg.engine.workers import Workers
from pyvseg.metrics import vos
from pyvseg.models import zoo
from pyvseg.video import frames_with_masks, open_video, read_labels, read_masks
from pyvseg.video.writer import OverlayWriter, PngWriter, RleWriter


@dataclass
class Options:
    """Frames per second from files to files, everything included but loading the network."""

    data: Path
    """DAVIS-style folder: JPEGImages and Annotations."""
    sequences: tuple[str, ...] = ("dog", "blackswan")
    frames: int = 50
    """Of each sequence."""
    clip_lengths: tuple[int, ...] = (1, 5, 10, 15, 25)
    workers: tuple[int, ...] = (1, 2)
    """Processes of the batch; they share the threads."""
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    rounds: int = 1
    """Every way runs once in each round; the best counts."""
    pytorch: bool = True
    """Leave out the loop in plain PyTorch."""
    out: Path | None = None
    """A file for the record, JSON."""


def plain_loop(network: nn.Module, jobs: list[Job], out: Path) -> None:
    for job in jobs:
        video = open_video(job.video)
        propagation = Propagation(network, clip_length=1)
        folder = out / job.name
        writers = [PngWriter(folder / "masks"), RleWriter(folder / "masks.json", job.name), OverlayWriter(folder / "overlay.mp4", video.size, video.fps)]
        for frame in frames_with_masks(video, read_masks(job.masks, video)):
            (result,) = propagation.step(frame)
            for writer in writers:
                writer.write(result)
        for writer in writers:
            writer.close()


def ways(options: Options) -> Iterator[tuple[str, str, Callable[[list[Job], Path], dict]]]:
    """Precision, name, and what runs jobs into a folder: it returns the seconds, and the busy shares where it knows them."""
    if options.pytorch:
        yield "float32", "plain PyTorch", lambda jobs, out: _timed(_as_defined(), jobs, out, "reference")
    for precision in options.precisions:
        yield precision, "plain loop", lambda jobs, out, p=precision: _timed(zoo.load("pcvos_tiny", precision=p), jobs, out, "auto")
        for workers in options.workers:
            for length in options.clip_lengths if workers == options.workers[0] else options.clip_lengths[-1:]:
                name = f"batch, clip {length}" + (f", {workers} processes" if workers > 1 else "")
                recipe = Recipe(precision=precision, clip_length=length)
                yield precision, name, lambda jobs, out, r=recipe, w=workers: _batch(jobs, out, r, w)


def _as_defined() -> nn.Module:
    chosen = zoo.variant("pcvos_tiny")
    return zoo.build_variant(chosen, checkpoints.read(chosen.bundled), name=chosen.name)


def _timed(network: nn.Module, jobs: list[Job], out: Path, backend: str) -> dict:
    started = time.perf_counter()
    with ops.backend(backend):
        plain_loop(network, jobs, out)
    return {"seconds": time.perf_counter() - started}


def _batch(jobs: list[Job], out: Path, recipe: Recipe, workers: int) -> dict:
    """Processes load their networks by themselves, so their time counts from the first video's beginning to the last one's end."""
    if workers == 1:
        loaded = recipe.task()
        object.__setattr__(recipe, "task", lambda: loaded)
    report = batch(jobs, recipe, out, execute=Workers(workers) if workers > 1 else None, progress=False)
    assert not report.failed, report.failed
    return {"seconds": report.seconds, "busy": {name: round(share, 3) for name, share in report.busy.items()}}


def accuracy(jobs: list[Job], out: Path, dataset: Davis, frames: int) -> float:
    """J&F, the mean over the sequences; the first and the last frame are not scored."""
    scores = {}
    for job in jobs:
        truth = [read_labels(path) for path in list(dataset.annotations(job.name).values())[:frames]]
        found = [read_labels(path) for path in sorted((out / job.name / "masks").glob("*.png"))]
        scores[job.name] = vos.sequence_scores(zip(truth[1:-1], found[1:-1], strict=True), 1)
    return float(np.mean([np.mean([score.j, score.f]) for score in scores.values()]))


def main(options: Options) -> None:
    keep_freed_memory()
    dataset, rows, work = Davis(options.data), {}, Path(tempfile.mkdtemp(prefix="pyvseg-benchmark-"))
    try:
        jobs = [_job(dataset, name, options.frames, work) for name in options.sequences]
        for turn in range(options.rounds):
            for n, (precision, name, run) in enumerate(ways(options)):
                out = work / f"{turn}-{n}"
                record = run(jobs, out)
                record["fps"] = options.frames * len(jobs) / record["seconds"]
                record["J&F"] = accuracy(jobs, out, dataset, options.frames)
                rows[precision, name] = max(rows.get((precision, name), record), record, key=lambda each: each["fps"])
                _print(precision, name, rows)
                shutil.rmtree(out)
    finally:
        shutil.rmtree(work)
    if options.out:
        facts = {"sequences": options.sequences, "frames": options.frames, "threads": torch.get_num_threads(), "load": os.getloadavg()}
        options.out.write_text(json.dumps(facts | {"rows": [{"precision": p, "way": n} | record for (p, n), record in rows.items()]}, indent=1) + "\n")


def _print(precision: str, name: str, rows: dict) -> None:
    row, base = rows[precision, name], rows.get((precision, "plain loop"))
    against = f"{row['fps'] / base['fps']:.2f}x" if base else ""
    busy = ", ".join(f"{stage} {100 * row['busy'][stage]:.0f} %" for stage in ("decode", "model", "write")) if row.get("busy") else ""
    print(f"{precision:9} {name:28} {row['fps']:6.2f} FPS {against:>7}  J&F {row['J&F']:.3f}  {busy}", flush=True)


def _job(dataset: Davis, name: str, frames: int, work: Path) -> Job:
    folder = work / "in" / name
    folder.mkdir(parents=True)
    for path in list(dataset.frames(name).values())[:frames]:
        os.symlink(path.resolve(), folder / path.name)
    return Job(name, folder, next(iter(dataset.annotations(name).values())))


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.batch"))
