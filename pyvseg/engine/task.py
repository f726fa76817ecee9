# SPDX-License-Identifier: Apache-2.0
"""What the tasks of `pyvseg.engine.tasks` have in common: the videos of a run, and one video under way."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Event
from typing import NamedTuple, Protocol

from tqdm import tqdm

from pyvseg.engine.jobs import Job
from pyvseg.engine.memory import queue_frames
from pyvseg.engine.output import Targets, VideoOutput
from pyvseg.engine.pipeline import Background, Prefetch
from pyvseg.engine.trace import span, spans
from pyvseg.errors import VideoError
from pyvseg.video.reader import Video, open_video
from pyvseg.video.types import Frame

SHORTER = "clip length {} in place of {}, which would not fit into memory"  # a lane's notes
ALONE = "segmented by itself: {} at once would not fit into memory"


@dataclass
class Session:
    """A run of a task over videos, and what it has done so far.

    stop      set by Ctrl-C
    resume    whether finished videos are left alone and suspended ones go on
    part      (start, stop), frames of a single video; None for all
    progress  a bar for each video
    decoder   of video files, see `open_video`
    """

    stop: Event
    resume: bool = False
    part: tuple[int, int | None] | None = None
    progress: bool = False
    decoder: str = "cpu"
    frames: int = 0  # taken from decoders
    found: Counter = field(default_factory=Counter)  # whatever a task counts, in finished videos


class Found(NamedTuple):
    """The videos behind what the user named."""

    jobs: list[Job]
    single: bool  # one video, not a folder of them
    note: str = ""  # worth telling


class Task(Protocol):
    """A loaded model, and what is to be made of videos with it."""

    at_once: int  # videos under way at a time, at most
    settings: dict  # all that results depend on besides video and masks: model, weights, decoder, ...

    def find(self, source, masks, annotations: str, sequences: list[str] | None) -> Found:
        """See `pyvseg.engine.run.run` for the arguments. Raises PyvsegError where this task cannot use them."""

    def targets(self, out: Path, name: str, single: bool) -> Targets:
        """The results of a run's video. A batch has a folder for each."""

    def lane(self, session: Session, job: Job, targets: Targets) -> Lane:
        """Opens the job's video. Raises VideoError."""

    def together(self, lanes: list[Lane]) -> None:
        """The model's part of a turn that the videos share."""

    def written(self, out: Path, targets: list[Targets], single: bool, session: Session) -> list[tuple[str, str]]:
        """After the last video of a run: writes what all have in common, and tells what lies where."""


class Lane:
    """One video under way: a decoder and a writer in threads of their own, turns of the model between them.

    Every method but `open` and `complete` runs in the model's thread. A task says what happens to the frames: `begin`, `step`,
    `save`, and `complete` if there is more to it.
    """

    turn: int  # frames that a turn takes
    lasting = True  # whether a suspended video can go on from what it has written

    def __init__(self, session: Session, job: Job, targets: Targets, video: Video, settings: dict) -> None:
        self.session, self.job, self.targets, self.video = session, job, targets, video
        self.name = job.name or video.name
        self.output = VideoOutput(targets, self.name, {"video": video.source, "frames": list(session.part or ()), **settings})
        self.first = self.done = self.output.resume_at() if session.resume else 0  # frames that an earlier run segmented; that are segmented now
        self.taken: list[Frame] = []  # this turn's frames
        self.at_end = self.idle = False  # all frames have been taken; and this turn there were none
        self.alone = False  # there is no room for others beside it
        self.note = ""  # what the user should know of the results
        self.began: float | None = None  # when its first turn came
        self._threads = ExitStack()
        self._sink: Background | None = None

    @property
    def seconds(self) -> float:
        """Since its first turn."""
        return 0.0 if self.began is None else round(time.perf_counter() - self.began, 3)

    @property
    def is_finished(self) -> bool:
        return self.session.resume and self.output.is_finished()

    def begin(self, saved: Path | None) -> None:
        """Prepares the model's state, `saved` by an earlier run or new, and the writers."""

    def open(self) -> None:
        """Starts the decoder and the writer; ahead of time, in a thread that opens videos."""
        first = self.first
        self.output.open(first)
        self.begin(self.output.state_path(first) if first else None)
        depth = queue_frames(self.video, self.turn)
        self._frames = iter(self._threads.enter_context(Prefetch(spans("decode", self.frames(), self.name), depth)))
        disable = None if self.session.progress else True  # None: shown on terminals only
        self._bar = tqdm(total=self.video.frame_count, initial=first, desc=self.name, unit=" frames", leave=False, disable=disable, file=sys.stderr)
        self._threads.enter_context(self._bar)
        self._sink = Background(self._write, depth)
        self._sink.__enter__()
        for frame in islice(self._frames, first):
            self.again(frame)
            if self.session.stop.is_set():
                return

    def frames(self) -> Iterable[Frame]:
        return self.video

    def again(self, frame: Frame) -> None:
        """A frame that an earlier run segmented passes by."""

    def fill(self) -> None:
        """Takes the next turn's frames; waits for the decoder."""
        self.began = self.began or time.perf_counter()
        self.taken = list(islice(self._frames, self.turn))
        self.at_end, self.idle = len(self.taken) < self.turn, not self.taken
        self.session.frames += len(self.taken)
        self._bar.update(len(self.taken))

    def step(self) -> None:
        """The model's part of the turn that is not shared, and handing on its results (`put`)."""

    def put(self, result) -> None:
        """A result for the writer; waits for it."""
        self._sink.put(result)

    def _write(self, result) -> None:
        with span("write", self.name):
            self.output.write(result)

    def read_again(self, result: Callable[[Frame], object]) -> bool:
        """A second pass over the video, now that more is known: the writer gets a result of each frame. False after Ctrl-C. Raises
        VideoError where the frames are not as many as at first."""
        count = 0
        with Prefetch(spans("decode", self.video, self.name), queue_frames(self.video, self.turn)) as frames:
            for count, frame in enumerate(frames, 1):
                if count > self.done:
                    break
                self.put(result(frame))
                if self.session.stop.is_set():
                    return False
        self.drain()
        if count != self.done:
            raise VideoError(f"{self.video.source}: {self.done} frames at the first reading, {'more' if count > self.done else count} at the second reading; give a file or a list")
        return True

    def drain(self) -> None:
        """Waits for the writer's end. Raises what went wrong there."""
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.__exit__(None, None, None)

    def complete(self) -> bool:
        """After the last turn, in a thread: what is left to write, then the results get their names. False after Ctrl-C."""
        self.drain()
        with span("write", self.name):
            self.output.finish(self.job.keep)
        self._threads.close()
        return True

    def save(self) -> Callable[[Path], None]:
        """What saves the model's state."""
        raise NotImplementedError

    def suspend(self) -> str:
        """After Ctrl-C: leaves what a later run needs to go on; says how far this one came."""
        self._close()
        self.output.suspend(*(self.save(), self.done) if self.lasting and self.done > self.first else ())
        return self.output.how_far(self.done)

    def abandon(self, error: BaseException) -> BaseException:
        """Leaves nothing unfinished, except what an earlier run left to go on from; returns the error to raise."""
        self._close()
        return self.output.given_up(error, self.first)

    def _close(self) -> None:
        with suppress(Exception):  # told already, or on its way to be
            self.drain()
        self._threads.close()


def opened(job: Job, session: Session) -> Video:
    """The job's video, or the session's part of it. Raises VideoError."""
    video = open_video(job.video, session.decoder)
    return video.part(*session.part) if session.part else video
