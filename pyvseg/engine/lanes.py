# SPDX-License-Identifier: Apache-2.0
"""Several videos under way: each has its own decoder and writer in threads of their own, all share the model.

The model runs in the caller's thread, turn by turn. While it works on one turn's frames the decoders fetch the next ones, the
writers write the last ones, the videos that have ended are finished, and the next video is opened. Every queue is bounded:
whatever is slowest makes the others wait, and memory does not depend on the length or the number of videos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from threading import Event
from typing import NoReturn, TypeVar

from pyvseg.engine.output import Interrupted
from pyvseg.engine.pipeline import Prefetch
from pyvseg.engine.task import Lane

J = TypeVar("J")


def drive(
    jobs: Iterable[J | None],
    make: Callable[[J], Lane | None],
    together: Callable[[list[Lane]], None],
    ended: Callable[[J, Exception | None], None],
    *,
    at_once: int,
    stop: Event,
) -> None:
    """Runs all jobs, up to `at_once` at a time, in their order: a resumed run puts the same frames together.

    jobs      may give None every now and then, instead of blocking, while nobody knows of another job
    make      opens a job's video; None where nothing is left to do
    together  the model's part of a turn that the videos share
    ended     is told of every job that ended, and of its error if it failed; what it raises ends the run

    Raises Interrupted once `stop` is set: every video under way has been suspended.
    """
    street = _Street(make, together, ended, at_once, stop)
    try:
        with ThreadPoolExecutor(at_once, "pyvseg-finish") as street.pool:
            with Prefetch(street.opened(jobs), 1) as ahead:
                try:
                    street.run(iter(ahead))
                finally:
                    street.over = True
            street.settle()
    except BaseException as error:  # Ctrl-C for the second time, in the middle of a turn, among them
        street.abandon(error)
    if street.cut or street.stopped:
        where = f"in {', '.join(street.stopped)}" if street.stopped else "between two videos"
        raise Interrupted(f"stopped {where}; the same command with --resume goes on")


class _Street:
    """The videos that wait for their turn, are under way, and are being finished."""

    def __init__(self, make, together, ended, at_once: int, stop: Event) -> None:
        self.make, self.together, self.ended, self.at_once, self.stop = make, together, ended, at_once, stop
        self.waiting: dict[int, Lane] = {}  # opened, not yet under way
        self.lanes: list[tuple[object, Lane]] = []
        self.finishing: dict[Future, tuple[object, Lane]] = {}
        self.stopped: list[str] = []
        self.held: tuple | None = None  # taken from those waiting, but has to be alone, or another one is
        self.cut = False  # jobs remain that nobody began
        self.over = False  # no more videos are wanted

    def opened(self, jobs: Iterable) -> Iterator[tuple[object, Lane | None, Exception | None]]:
        for job in jobs:
            if self.stop.is_set():
                self.cut = True
                return
            if self.over:
                return
            if job is None:
                continue
            lane = None
            try:
                lane = self.make(job)
                if lane is not None:
                    self.waiting[id(lane)] = lane
                    lane.open()
            except Exception as error:
                self.waiting.pop(id(lane), None)
                yield job, None, error if lane is None else lane.abandon(error)
            else:
                yield job, lane, None

    def run(self, ahead: Iterator) -> None:
        while not self.stop.is_set():  # asked between two turns only: then the states are complete
            for job, lane in self.lanes[:]:
                self._guarded(lane.fill, job, lane)
            self._take(ahead)
            if not self.lanes:
                return
            try:
                self.together([lane for _, lane in self.lanes])
            except Exception as error:
                for job, lane in self.lanes[:]:
                    self._failed(job, lane, error)
            for job, lane in self.lanes[:]:
                self._guarded(lane.step, job, lane)
            self._finish([each for each in self.lanes if each[1].at_end])
            self._collect(most=self.at_once)

    def _take(self, ahead: Iterator) -> None:
        """Videos that had their last frames before this turn make room for others."""
        while True:
            ended = [each for each in self.lanes if each[1].idle]
            for job, lane in ended:
                self._guarded(lane.step, job, lane)
            self._finish([each for each in ended if each in self.lanes])
            if len(self.lanes) == self.at_once or self.stop.is_set():
                return
            job, lane, error = self.held or next(ahead, (None, None, None))
            self.held = None
            if job is None:
                return
            if lane is None:
                self.ended(job, error)
                continue
            if self.stop.is_set():  # it may have been opened by half
                return
            if self.lanes and (lane.alone or self.lanes[0][1].alone):
                self.held = job, lane, error
                return
            self.waiting.pop(id(lane))
            self.lanes.append((job, lane))
            self._guarded(lane.fill, job, lane)

    def _finish(self, ended: list[tuple[object, Lane]]) -> None:
        for each in ended:
            self._collect(most=self.at_once - 1)
            self.lanes.remove(each)
            self.finishing[self.pool.submit(each[1].complete)] = each

    def _guarded(self, action: Callable[[], None], job, lane: Lane) -> None:
        """A video that fails is no reason for the others to."""
        try:
            action()
        except Exception as error:
            self._failed(job, lane, error)

    def _failed(self, job, lane: Lane, error: Exception) -> None:
        self.lanes.remove((job, lane))
        self.ended(job, lane.abandon(error))

    def _collect(self, most: int) -> None:
        """Takes note of videos that are finished; waits until at most so many are still being finished."""
        while self.finishing:
            room = len(self.finishing) <= most
            done, _ = wait(self.finishing, timeout=0 if room else 0.5, return_when=FIRST_COMPLETED)
            if room and not done:
                return
            for future in done:
                self._note(future, *self.finishing.pop(future))

    def _note(self, future: Future, job, lane: Lane) -> None:
        self.lanes.append((job, lane))
        if future.exception() is not None:
            self._failed(job, lane, future.exception())
        elif future.result():
            self.lanes.pop()
            self.ended(job, None)

    def settle(self) -> None:
        """Waits for what is being finished; what remains after Ctrl-C is suspended."""
        self._collect(most=0)
        while self.lanes:
            self.stopped.append(self.lanes[0][1].suspend())
            del self.lanes[0]
        self.cut |= bool(self.waiting)
        while self.waiting:
            self.waiting.popitem()[1].suspend()

    def abandon(self, error: BaseException) -> NoReturn:
        """Videos that were only to be finished are; the others leave nothing."""
        for future, (job, lane) in self.finishing.items():
            with suppress(Exception):
                self._note(future, job, lane)
        lanes = [lane for _, lane in self.lanes] + list(self.waiting.values())
        errors = [lane.abandon(error) for lane in lanes]
        if isinstance(error, KeyboardInterrupt):
            raise errors[0] if len(errors) == 1 else Interrupted("stopped at once; finished videos are kept, the others start again") from None
        raise error
