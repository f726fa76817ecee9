# SPDX-License-Identifier: Apache-2.0
"""From video files to result files with large networks, as `pyvseg batch` runs them: `python -m benchmarks.end_to_end --device cuda`.

Videos are written on the spot and weights are random, so this measures speed alone. The first run of a shape builds kernels and
captures graphs; it is not counted.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks.loaded import Loaded
from pyvseg import checkpoints
from pyvseg.engine.allocator import keep_freed_memory
from pyvseg.engine.batch import batch
from pyvseg.engine.jobs import Job
from pyvseg.engine.recipe import Recipe, Results
from pyvseg.models import zoo
from pyvseg.video.types import FrameResult
from pyvseg.video.writer import OverlayWriter


@dataclass
class Options:
    device: str = "cuda"
    videos: int = 8
    frames: int = 200
    """Of each video."""
    quick: bool = False
    """Small videos of few frames: whether it runs, not how fast."""
    seconds: float = 75
    """No further model is begun after that."""
    out: Path | None = None
    """A file for the record, JSON; written anew after each row."""


@dataclass(frozen=True)
class Way:
    model: str
    size: tuple[int, int]
    clip_length: int | None
    precision: str
    files: bool  # PNGs and overlays, not the JSON alone


MODELS = (("pcvos_r50_ytvos", (480, 854), 25), ("ctvis_r50_ytvis19", (360, 640), None))


def ways() -> Iterator[Way]:
    for precision in ("bfloat16", "float32"):
        for files in (False, True):
            for model, size, clip_length in MODELS:
                yield Way(model, size, clip_length, precision, files)


def write_video(path: Path, size: tuple[int, int], frames: int) -> Path:
    """Two discs that move over coloured noise."""
    height, width = size
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 160, (height // 8 + 1, width // 8 + 1, 3), np.uint8).repeat(8, 0).repeat(8, 1)[:height, :width]
    y, x = np.mgrid[:height, :width]
    movie = OverlayWriter(path, size, None)
    for t in range(frames):
        image = np.ascontiguousarray(np.roll(ground, t, 1))
        for disc, colour in ((0.3, (240, 60, 60)), (0.7, (60, 60, 240))):
            image[(y - disc * height) ** 2 + (x - width * (0.2 + 0.6 * t / frames)) ** 2 < (height / 8) ** 2] = colour
        movie.write(FrameResult(t, f"{t:05d}", image, np.zeros(size, np.uint8), ()))
    movie.close()
    return path


def masks(size: tuple[int, int]) -> dict[int, np.ndarray]:
    labels = np.zeros(size, np.uint8)
    labels[size[0] // 5 : 2 * size[0] // 5, size[1] // 8 : size[1] // 4], labels[3 * size[0] // 5 : 4 * size[0] // 5, size[1] // 8 : size[1] // 4] = 1, 2
    return {0: labels}


def weights(model: str, folder: Path) -> Path:
    path = folder / f"{model}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        chosen = zoo.variant(model)
        checkpoints.write(path, zoo.SYSTEMS[chosen.system].network(chosen.settings).state_dict())
    return path


def measure(way: Way, options: Options, work: Path) -> dict:
    size, frames = ((96, 160), 3) if options.quick else (way.size, options.frames)
    video = work / f"{size[0]}.mp4"
    video = video if video.exists() else write_video(video, size, frames)
    recipe = Recipe(
        model=way.model, weights=weights(way.model, work), device=options.device, precision=way.precision, clip_length=way.clip_length,
        results=Results(pngs=way.files, overlay=way.files),
    )  # fmt: skip
    loaded = Loaded(recipe, recipe.task())
    given = masks(size) if recipe.needs_masks else None
    for run, count in (("warm", loaded.ready.at_once), ("timed", 1 if options.quick else options.videos)):
        jobs = [Job(f"{n}", video, given) for n in range(count)]
        with tempfile.TemporaryDirectory(dir=work) as out:
            report = batch(jobs, loaded, Path(out) / run, progress=False)
        assert not report.failed, report.failed
    return {"frames": report.frames, "seconds": report.seconds, "fps": report.fps, "busy": {k: round(v, 3) for k, v in report.busy.items()}}


def main(options: Options) -> None:
    keep_freed_memory()
    started, rows, failed = time.monotonic(), [], []
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    with tempfile.TemporaryDirectory(prefix="pyvseg-benchmark-") as folder:
        for way in ways():
            if time.monotonic() - started > options.seconds:
                print(f"no time left for {way.model} {way.precision}")
                continue
            try:
                row = measure(way, options, Path(folder))
            except Exception as error:  # the others are worth having
                failed.append(f"{way.model} {way.precision}: {type(error).__name__}: {error}")
                print(f"FAILED {failed[-1]}", flush=True)
                continue
            rows.append(asdict(way) | row)
            busy = ", ".join(f"{stage} {100 * row['busy'].get(stage, 0):.0f} %" for stage in ("decode", "model", "write"))
            print(f"{way.model:18} {way.precision:9} {'all files' if way.files else 'JSON only'}  {row['fps']:7.1f} FPS  {busy}", flush=True)
            if options.out:
                options.out.write_text(json.dumps({"device": name, "rows": rows}, indent=1) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.end_to_end"))
