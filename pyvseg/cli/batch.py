# SPDX-License-Identifier: Apache-2.0
"""`pyvseg batch`"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import tyro

from pyvseg.engine.recipe import Recipe
from pyvseg.engine.trace import STAGES
from pyvseg.errors import PyvsegError

_SHOWN = 20  # lines of a kind in the report; the manifest has all


@dataclass
class Batch:
    """Segment many videos, at the speed of the hardware, and lose nothing when something dies.

    Each video's results lie in OUT/NAME/, as `pyvseg run` writes them; OUT/manifest.jsonl says which are done, and which failed and
    why. After a crash, a kill or Ctrl-C the same command does exactly the rest. For example

        pyvseg batch archive/ --model ctvis_r50_ytvis19 --weights CTVIS_checkpoint.pth --out results
        pyvseg batch 'archive/**/*.mp4' --masks first_frames/ --clip-length 25 --out results
        pyvseg batch list.txt --masks first_frames/ --workers 8 --out results
        pyvseg batch list.txt --masks first_frames/ --shard 3/16 --out results
        pyvseg batch list.txt --masks first_frames/ --out results --ray

    Exit status: 0 all done, 1 some videos failed, 2 bad input or nothing can be written, 130 Ctrl-C or SIGTERM.
    """

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Videos, folders of videos or images, DAVIS, YouTube-VOS, YouTube-VIS and OVIS folders, patterns in quotes ('a/**/*.mp4'), and .txt lists:
    one path in each line, relative to the list, and a tab and the path of its masks if you like."""
    recipe: Recipe = field(default_factory=Recipe)
    masks: Path | None = None
    """Folder with NAME.png, NAME.json or NAME/ for the video called NAME: what to follow. For models that need masks."""
    out: Path = Path("output")
    """Folder for the results."""
    workers: int = 1
    """Processes: one for each GPU, or shares of the CPU."""
    ray: str | None = None
    """Spread the videos over the Ray cluster at this address, HOST:PORT; without address, or auto: the one that this machine belongs to. All its
    machines must see inputs, weights and OUT under the same paths. Needs pyvseg[ray]."""
    ray_cpus: float = 1
    """Processors that a video takes on the cluster."""
    ray_gpus: float = 0
    """GPUs that a video takes on the cluster."""
    shard: str = "1/1"
    """I/N: this is the I-th of N processes, on machines that see the same OUT, that share the work (SLURM arrays)."""
    retry_failed: bool = False
    """Try videos again that failed before."""
    overwrite: bool = False
    """Start again and replace the results in OUT."""
    profile: Path | None = None
    """Write a trace of what every thread did, for Perfetto or chrome://tracing."""


def completed(arguments: list[str]) -> list[str]:
    """`--ray` may stand without an address."""
    following = [*arguments[1:], "-"]
    return [each for one, after in zip(arguments, following) for each in ((one, "auto") if one == "--ray" and after.startswith("-") else (one,))]


def batch(options: Batch) -> int:
    from pyvseg.engine.allocator import keep_freed_memory
    from pyvseg.engine.batch import batch as run_batch
    from pyvseg.engine.inputs import find_inputs
    from pyvseg.engine.jobs import find_videos

    at_once = 1 if options.ray is not None else options.recipe.at_once  # batches are filled up to so many videos
    recipe = replace(options.recipe, at_once=at_once, weights=options.recipe.weights and options.recipe.weights.absolute())  # other machines may look for it
    if not recipe.needs_masks and options.masks is not None:
        raise PyvsegError(f"{recipe.model} finds the objects itself; leave --masks out")
    jobs, remarks = find_inputs(list(options.inputs), options.masks, recipe.needs_masks, partial(find_videos, classes=recipe.classes, model=recipe.model, boxes=recipe.finds_boxes))
    for remark in remarks:
        print(f"pyvseg: {remark}", file=sys.stderr)
    keep_freed_memory()
    report = run_batch(
        jobs, recipe, options.out, execute=_execute(options), shard=_shard(options.shard), retry_failed=options.retry_failed,
        overwrite=options.overwrite, profile=options.profile,
    )  # fmt: skip
    _print(report)
    return 1 if report.failed or report.skipped else 0


def _execute(options: Batch):
    if options.workers < 1:
        raise PyvsegError(f"--workers {options.workers}: must be at least 1")
    if options.ray is not None:
        from pyvseg.engine.cluster import Cluster

        if options.workers > 1:
            raise PyvsegError("--ray and --workers exclude each other: the cluster has workers of its own")
        if (options.recipe.at_once or 1) > 1:
            raise PyvsegError("--ray and --at-once exclude each other: a task of the cluster is one video")
        return Cluster(options.ray, options.ray_cpus, options.ray_gpus)
    if options.workers == 1:
        return None
    from pyvseg.engine.workers import Workers

    return Workers(options.workers)


def _shard(text: str) -> tuple[int, int]:
    first, slash, count = text.partition("/")
    if not (slash and first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise PyvsegError(f"--shard {text}: expected I/N, for example 1/8, the first of eight")
    return int(first), int(count)


def _print(report) -> None:
    for remark in report.remarks[:_SHOWN]:
        print(f"pyvseg: {remark}", file=sys.stderr)
    for outcome in report.failed[:_SHOWN]:
        print(f"pyvseg: failed: {outcome.reason}", file=sys.stderr)
    before = f", {report.before} before" if report.before else ""
    print(f"{report.done} video{'s' if report.done != 1 else ''} done{before}   {report.out}")
    if report.failed or report.skipped:
        again = f", {len(report.skipped)} before (--retry-failed tries them again)" if report.skipped else ""
        print(f"{len(report.failed)} failed{again}; reasons in {report.out}/manifest*.jsonl", file=sys.stderr)
        for reason, count in report.reasons()[:_SHOWN] if len(report.failed) > _SHOWN or report.skipped else ():
            print(f"{count:6} x {reason}", file=sys.stderr)
    if report.frames:
        print(f"{report.frames} frames in {report.seconds:.1f} s: {report.fps:.1f} frames per second, reading and writing included")
    if report.busy:
        print("busy: " + _busy(report.busy))


def _busy(shares: dict[str, float]) -> str:
    """Stages that work at the same time, each as a share of the wall time; in brackets what the model's time went into."""
    told = {name: f"{name} {100 * share:.0f} %" for name, share in shares.items()}
    parts = ", ".join(told[name] for name in sorted(told, key=shares.get, reverse=True) if name not in STAGES)
    return ", ".join(told[name] + (f" ({parts})" if parts and name == "model" else "") for name in STAGES if name in told)
