# SPDX-License-Identifier: Apache-2.0
"""Many videos, nothing lost: `pyvseg batch`."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Protocol

from tqdm import tqdm

from pyvseg.engine.inputs import same_place
from pyvseg.engine.jobs import Job
from pyvseg.engine.lanes import drive
from pyvseg.engine.manifest import Manifest, Outcome
from pyvseg.engine.output import UNFINISHED, Interrupted, Targets
from pyvseg.engine.pipeline import stop_on_interrupt
from pyvseg.engine.task import Lane, Session, Task
from pyvseg.engine.trace import recording
from pyvseg.errors import OutputError, PyvsegError
from pyvseg.video.writer import output_errors


class Recipe(Protocol):
    """How videos are segmented (`pyvseg.engine.recipe.Recipe`)."""

    def settings(self) -> dict:
        """What must be equal for results to belong together."""

    def task(self) -> Task:
        """Loads the model."""


@dataclass
class Report:
    """What a batch did. `frames` and `seconds` count this run; `busy` are the shares of the wall time by stage."""

    out: Path
    videos: int
    before: int = 0  # videos that were finished already
    skipped: list[Outcome] = field(default_factory=list)  # that failed before and were not tried again
    done: int = 0
    failed: list[Outcome] = field(default_factory=list)
    frames: int = 0
    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def reasons(self) -> list[tuple[str, int]]:
        """Why videos failed, now or before, without their names; the most frequent reason first."""
        return Counter(_kind(outcome) for outcome in (*self.failed, *self.skipped)).most_common()

    @property
    def fps(self) -> float:
        return self.frames / self.seconds if self.seconds else 0.0


# Runs jobs: tells of every outcome, returns busy shares. `_here` is one; `workers` and `cluster` have the others.
Execute = Callable[[list[Job], Recipe, Path, Event, Callable[[Outcome], None]], dict[str, float]]


def batch(
    jobs: list[Job],
    recipe: Recipe,
    out: str | Path,
    *,
    execute: Execute | None = None,
    shard: tuple[int, int] = (1, 1),
    retry_failed: bool = False,
    overwrite: bool = False,
    profile: Path | None = None,
    progress: bool = True,
) -> Report:
    """Segments videos into OUT/NAME/, as `pyvseg run` would into OUT, and notes each in OUT/manifest.jsonl.

    Whatever stops it, the same call goes on: what the manifest says is done stays as it is, the rest runs. A video that fails
    is noted with its reason and stops nothing.

    shard    (i, n): of n processes that share the work this is the i-th, counted from 1, with a manifest of its own
    profile  a file for the trace of what every thread did, for Chrome's or Perfetto's viewer

    Raises OutputError where results of other settings lie or nothing can be written, Interrupted after Ctrl-C.
    """
    out, (i, n) = Path(out), shard
    _check_out(out, overwrite)
    if profile is not None:
        with output_errors(profile), open(profile, "a"):  # rather now than after the last video
            pass
    manifest = Manifest(out, recipe.settings(), part="" if n == 1 else f"-{i}-of-{n}", overwrite=overwrite)
    try:
        mine = jobs[i - 1 :: n]
        report = Report(out, len(mine))
        todo = _remaining(mine, manifest, report, retry_failed)
        with stop_on_interrupt() as stop, recording(keep=profile is not None) as recorder:
            try:
                _run(todo, recipe, report, manifest, execute or _here, stop, progress)
            finally:
                if profile is not None:
                    recorder.save(profile)
        return report
    finally:
        manifest.close()


def _check_out(out: Path, overwrite: bool) -> None:
    with output_errors(out):
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file; choose another --out folder")
        if out.is_dir() and not overwrite and any(out.iterdir()) and not any(out.glob("manifest*.jsonl")):
            raise OutputError(f"{out} already holds other files; choose another --out, or write among them with --overwrite")


def _remaining(jobs: list[Job], manifest: Manifest, report: Report, retry_failed: bool) -> list[Job]:
    if manifest.damaged:
        report.remarks.append(f"{manifest.path.parent}: {manifest.damaged} damaged lines in the manifest; their videos run again")
    todo = []
    for job in jobs:
        known = manifest.outcomes.get(job.name)
        if known is not None and not known.reason and not same_place(known.source, job.source):
            raise PyvsegError(f"{report.out / job.name} is of {known.source}; {job.source} would replace it: rename it, choose another --out, or use --overwrite")
        if known is not None and known.reason and not retry_failed:
            report.skipped.append(known)
        elif known is not None and not known.reason and (report.out / job.name).is_dir():
            report.before += 1
        else:
            todo.append(job)
    return todo


def _run(todo: list[Job], recipe: Recipe, report: Report, manifest: Manifest, execute: Execute, stop: Event, progress: bool) -> None:
    started = time.perf_counter()
    with tqdm(total=report.videos - len(report.skipped), initial=report.before, unit=" videos", leave=False, disable=None if progress else True) as bar:

        def tell(outcome: Outcome) -> None:
            manifest.add(outcome)
            report.frames += outcome.frames
            report.remarks += [f"{outcome.source}: {outcome.note}"] if outcome.note else []
            if outcome.reason:
                report.failed.append(outcome)
            else:
                report.done += 1
            bar.set_postfix(failed=len(report.failed), frames=report.frames, refresh=False)
            bar.update()

        try:
            report.busy = execute(todo, recipe, report.out, stop, tell) if todo else {}
            if stop.is_set() and report.done + len(report.failed) < len(todo):
                raise KeyboardInterrupt
        except PyvsegError as error:
            if not (isinstance(error, OutputError) or report.before or report.done):
                raise
            raise type(error)(f"{error}; {_kept(report)}, the same command goes on when that is mended") from None
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {_kept(report)}, the same command goes on") from None
        finally:
            with suppress(OSError):
                (report.out / UNFINISHED).rmdir()  # refuses unless it is empty
    report.seconds = time.perf_counter() - started


def _kept(report: Report) -> str:
    finished, failed = report.before + report.done, len(report.failed) + len(report.skipped)
    noted = f", {failed} failed" if failed else ""
    return f"{finished} of {report.videos} videos are finished and kept{noted}, {report.videos - finished - failed} remain"


def _here(jobs: list[Job], recipe: Recipe, out: Path, stop: Event, tell: Callable[[Outcome], None]) -> dict[str, float]:
    return segment(jobs, recipe.task(), out, stop, tell)


def segment(jobs: Iterable[Job], task: Task, out: Path, stop: Event, tell: Callable[[Outcome], None]) -> dict[str, float]:
    """Runs the jobs in this process; returns busy shares. Raises OutputError where nothing can be written: that concerns every video."""
    session = Session(stop, resume=True, decoder=task.settings.get("decoder", "cpu"))
    lanes: dict[str, Lane] = {}

    def make(job: Job) -> Lane:
        lanes[job.name] = lane = task.lane(session, job, Targets(out, out / UNFINISHED / job.name, {}, out / job.name))
        return lane

    def ended(job: Job, error: Exception | None) -> None:
        if isinstance(error, OutputError):
            raise error
        lane = lanes.pop(job.name, None)
        begun = () if lane is None else (lane.done - lane.first, lane.seconds, lane.note)
        tell(Outcome(job.name, job.source, error and _reason(error), *begun))

    with recording() as recorder:
        recorder.restart()
        drive(jobs, make, task.together, ended, at_once=task.at_once, stop=stop)
        return recorder.shares()


def _kind(outcome: Outcome) -> str:
    """What is left of the reason without what only this video has: paths and numbers."""
    words = outcome.reason.replace(outcome.source, "").strip(": ").split()
    return re.sub(r"\d+", "N", " ".join("..." if "/" in word else word for word in words))


def _reason(error: Exception) -> str:
    text = str(error).splitlines() or [""]
    return text[0] if isinstance(error, PyvsegError) else f"{type(error).__name__}: {text[0]}"
