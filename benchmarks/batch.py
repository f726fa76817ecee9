# SPDX-License-Identifier: Apache-2.0
"""`pyvseg batch` against a plain loop, and accuracy beside speed by clip length: `python -m benchmarks.batch --data DAVIS`.

The plain loop is what one writes first: read a frame, run the network on it, write its mask, overlay and RLE. It has the network,
readers and writers of the batch; only the engine is missing. `plain PyTorch` is the same loop with the network as it is
defined, in PyTorch's own operations: norms not folded, no kernels of ours; with PyTorch's allocator, as whoever writes such a loop has
it, and once more with freed memory kept, as all the other ways do. Every way runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn

from benchmarks.apart import Apart
from benchmarks.harness import machine
from benchmarks.loaded import Loaded
from pyvseg import checkpoints, ops
from pyvseg.datasets.davis import Davis
from pyvseg.engine.batch import batch
from pyvseg.engine.jobs import Job
from pyvseg.engine.propagate import Propagation, ready
from pyvseg.engine.recipe import Recipe
from pyvseg.engine.workers import Workers
from pyvseg.metrics import vos
from pyvseg.models import zoo
from pyvseg.video import frames_with_masks, open_video, read_labels, read_masks
from pyvseg.video.writer import OverlayWriter, PngWriter, RleWriter


@dataclass
class Options:
    """Frames per second from files to files, everything included but loading the network; beside them how many times those of the
    plain loop and of plain PyTorch."""

    data: Path
    """DAVIS-style folder: JPEGImages and Annotations."""
    sequences: tuple[str, ...] = ("dog", "blackswan")
    frames: int = 50
    """Of each sequence."""
    clip_lengths: tuple[int, ...] = (1, 5, 10, 15, 25)
    workers: tuple[int, ...] = (2,)
    """Batches in so many processes too, which share the threads."""
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    rounds: int = 2
    """So often every way runs; the best counts."""
    pytorch: bool = True
    """Leave out the loops in plain PyTorch."""
    out: Path | None = None
    """A file for the record, JSON."""


def plain_loop(network: nn.Module, jobs: list[Job], out: Path) -> None:
    for job in jobs:
        video = open_video(job.video)
        propagation = Propagation(network, clip_length=1)
        folder = out / job.name
        writers = [PngWriter(folder / "masks"), RleWriter(folder / "masks.json", job.name), OverlayWriter(folder / "overlay.mp4", video.size, video.fps)]
        for frame in frames_with_masks(video, read_masks(job.masks, video)):
            result = ready(*propagation.step(frame))
            for writer in writers:
                writer.write(result)
        for writer in writers:
            writer.close()


@dataclass(frozen=True)
class Way:
    """A row of the table: `build(*arguments)` makes what runs jobs into a folder and returns seconds and more."""

    precision: str
    name: str
    build: Callable
    arguments: tuple
    keep_freed: bool = True
    copies: int = 1  # of each video: processes are measured apart from their start


def ways(options: Options) -> Iterator[Way]:
    if options.pytorch:
        yield Way("float32", "plain PyTorch", loop, ("float32", False), keep_freed=False)
        yield Way("float32", "plain PyTorch, memory kept", loop, ("float32", False))
    for precision in options.precisions:
        yield Way(precision, "plain loop", loop, (precision, True))
        for length in options.clip_lengths:
            yield Way(precision, f"batch, clip {length}", engine, (precision, length, 1))
        for workers in options.workers:
            for length in dict.fromkeys((options.clip_lengths[0], options.clip_lengths[-1])):
                yield Way(precision, f"batch, clip {length}, {workers} processes", engine, (precision, length, workers), copies=3)


def loop(precision: str, ours: bool) -> Callable[[list[Job], Path], dict]:
    chosen = zoo.variant("pcvos_tiny")
    network = zoo.load(chosen.name, precision=precision) if ours else zoo.build_variant(chosen, checkpoints.read(chosen.bundled), name=chosen.name)

    def run(jobs: list[Job], out: Path) -> dict:
        started = time.perf_counter()
        with ops.backend("auto" if ours else "reference"):
            plain_loop(network, jobs, out)
        return {"seconds": time.perf_counter() - started}

    return run


def engine(precision: str, clip_length: int, workers: int) -> Callable[[list[Job], Path], dict]:
    """Several processes load their networks by themselves, and their time counts that."""
    recipe = Recipe(precision=precision, clip_length=clip_length)
    loaded = recipe if workers > 1 else Loaded(recipe, recipe.task())

    def run(jobs: list[Job], out: Path) -> dict:
        report = batch(jobs, loaded, out, execute=Workers(workers) if workers > 1 else None, progress=False)
        assert not report.failed, report.failed
        return {"seconds": report.seconds, "busy": {name: round(share, 3) for name, share in report.busy.items()}}

    return run


def accuracy(jobs: list[Job], out: Path, dataset: Davis, frames: int) -> float:
    """J&F, the mean over the sequences; the first and the last frame are not scored."""
    scores = {}
    for job in jobs:
        truth = [read_labels(path) for path in list(dataset.annotations(job.name).values())[:frames]]
        found = [read_labels(path) for path in sorted((out / job.name / "masks").glob("*.png"))]
        scores[job.name] = vos.sequence_scores(zip(truth[1:-1], found[1:-1], strict=True), 1)
    return float(np.mean([np.mean([score.j, score.f]) for score in scores.values()]))


def main(options: Options) -> None:
    dataset, rows, work = Davis(options.data), {}, Path(tempfile.mkdtemp(prefix="pyvseg-benchmark-"))
    threads = torch.get_num_threads()
    try:
        jobs = [_job(dataset, name, options.frames, work) for name in options.sequences]
        for n, way in enumerate(ways(options)):
            given, out = [replace(job, name=f"{job.name}{copy or ''}") for copy in range(way.copies) for job in jobs], work / str(n)
            run = Apart(way.build, *way.arguments, threads=threads, keep_freed=way.keep_freed)
            records = []
            for _ in range(options.rounds):
                shutil.rmtree(out, ignore_errors=True)
                records.append(run(given, out))
            run.close()
            best = min(records, key=lambda record: record["seconds"])
            best |= {"fps": options.frames * len(given) / best["seconds"], "J&F": accuracy(jobs, out, dataset, options.frames)}
            rows[way.precision, way.name] = best
            _print(way.precision, way.name, rows)
            shutil.rmtree(out)
    finally:
        shutil.rmtree(work)
    if options.out:
        facts = {"machine": machine(threads), "sequences": options.sequences, "frames": options.frames}
        options.out.write_text(json.dumps(facts | {"rows": [{"precision": p, "way": n} | record for (p, n), record in rows.items()]}, indent=1) + "\n")


def _print(precision: str, name: str, rows: dict) -> None:
    row, loops = rows[precision, name], (rows.get((precision, "plain loop")), rows.get(("float32", "plain PyTorch")))
    against = " / ".join(f"{row['fps'] / base['fps']:.2f}x" if base else "-" for base in loops)
    busy = ", ".join(f"{stage} {100 * row['busy'][stage]:.0f} %" for stage in ("decode", "model", "write")) if row.get("busy") else ""
    print(f"{precision:9} {name:28} {row['fps']:6.2f} FPS  {against:>15}  J&F {row['J&F']:.3f}  {busy}", flush=True)


def _job(dataset: Davis, name: str, frames: int, work: Path) -> Job:
    folder = work / "in" / name
    folder.mkdir(parents=True)
    for path in list(dataset.frames(name).values())[:frames]:
        os.symlink(path.resolve(), folder / path.name)
    return Job(name, folder, next(iter(dataset.annotations(name).values())))


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.batch"))
