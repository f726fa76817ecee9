# SPDX-License-Identifier: Apache-2.0
"""One video, or the videos of a folder or a data set, through a task: `pyvseg run`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from pyvseg.engine.jobs import Job
from pyvseg.engine.lanes import drive
from pyvseg.engine.output import check_out
from pyvseg.engine.pipeline import stop_on_interrupt
from pyvseg.engine.task import Lane, Session, Task
from pyvseg.errors import PyvsegError


@dataclass
class Summary:
    """What a run did. `frames` and `seconds` count the frames of this run, from decoding to written files."""

    videos: int
    frames: int = 0
    seconds: float = 0.0
    note: str = ""
    found: dict[str, int] = field(default_factory=dict)  # what the task counted
    written: list[tuple[str, str]] = field(default_factory=list)  # what lies where

    @property
    def fps(self) -> float:
        return self.frames / self.seconds if self.seconds else 0.0


def run(
    task: Task,
    source,
    masks=None,
    *,
    out: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    frames: tuple[int, int | None] | None = None,
    annotations: str = "auto",
    sequences: list[str] | None = None,
    progress: bool = True,
) -> Summary:
    """Sends videos through the task and writes its results under `out`; the tasks say which.

    source, masks  a video and what to follow in it (`open_video`, `read_masks`), or what holds several (`jobs.find_jobs`, `jobs.find_videos`)
    frames         (start, stop) of one video, counted from 0; results keep the frame numbers of the whole video
    annotations    which masks of a data set to use, see `jobs.find_jobs`
    sequences      only these videos of several

    Raises VideoError for bad input (nothing of that video remains; finished ones do), OutputError where results cannot be written,
    Interrupted after Ctrl-C; with `resume` the run goes on to the very same results.
    """
    out, started = Path(out), time.perf_counter()
    jobs, single, note = task.find(source, masks, annotations, sequences)
    task = replace(task, at_once=min(task.at_once, len(jobs)))  # batches are filled up to so many videos
    if frames and not single:
        raise PyvsegError(f"{source} holds several videos; --frames is for one")
    check_out(out, overwrite, resume)
    if note and progress:
        print(note, file=sys.stderr)
    targets = {job.name: task.targets(out, job.name, single) for job in jobs}
    with stop_on_interrupt() as stop, tqdm(total=len(jobs), unit=" videos", leave=False, disable=None if progress and not single else True) as bar:
        session = Session(stop, resume, frames, progress and single, task.settings.get("decoder", "cpu"))

        def make(job: Job) -> Lane | None:
            lane = task.lane(session, job, targets[job.name])
            if lane.note and progress:
                tqdm.write(f"{lane.video.source}: {lane.note}", file=sys.stderr)
            return None if lane.is_finished else lane

        def ended(job: Job, error: Exception | None) -> None:
            if error is not None:
                raise error
            bar.set_postfix(frames=session.frames, refresh=False)
            bar.update()

        drive(jobs, make, task.together, ended, at_once=task.at_once, stop=stop)
    written = task.written(out, list(targets.values()), single, session)
    return Summary(len(jobs), session.frames, time.perf_counter() - started, note, dict(session.found), written)
