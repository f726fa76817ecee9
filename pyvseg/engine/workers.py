# SPDX-License-Identifier: Apache-2.0
"""A batch in several processes of one machine: one for each GPU, or shares of the CPU.

Each loads the model and runs the jobs that it is sent; only this process writes the manifest. A process that dies is replaced,
and its videos are given to others.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event

from pyvseg.engine.jobs import Job
from pyvseg.engine.manifest import Outcome
from pyvseg.engine.trace import keeps, recording, take
from pyvseg.errors import PyvsegError

_TRIES = 3  # of a video whose process dies


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    jobs: dict[str, Job] = field(default_factory=dict)  # sent, not yet ended
    room: int = 0  # jobs that it may hold; 0 until its model is loaded
    told: str = ""  # "all" when no more will come, "stop" after Ctrl-C


@dataclass(frozen=True)
class Workers:
    """Executes a batch (`pyvseg.engine.batch.Execute`) in `count` processes."""

    count: int

    def __call__(self, jobs: list[Job], recipe, out: Path, stop: Event, tell: Callable[[Outcome], None]) -> dict[str, float]:
        return _Run(min(self.count, len(jobs)), deque(jobs), recipe, out, stop, tell).run()


@dataclass
class _Run:
    count: int
    waiting: deque[Job]
    recipe: object
    out: Path
    stop: Event
    tell: Callable[[Outcome], None]
    workers: list[_Worker] = field(default_factory=list)
    deaths: Counter = field(default_factory=Counter)
    busy: Counter = field(default_factory=Counter)

    def run(self) -> dict[str, float]:
        try:
            self.workers = [self._start(i) for i in range(self.count)]
            while self.workers:
                self._feed()
                for pipe in wait([worker.pipe for worker in self.workers], timeout=0.5):
                    self._hear(next(worker for worker in self.workers if worker.pipe is pipe))
        finally:
            for worker in self.workers:
                worker.process.kill()  # what it has not finished is as if it never began
                worker.process.join()
        if self.stop.is_set():
            raise KeyboardInterrupt
        return {name: seconds / self.count for name, seconds in self.busy.items()}

    def _start(self, number: int) -> _Worker:
        context = _context()
        ours, theirs = context.Pipe()
        given = theirs, self.recipe, self.out, number, self.count, keeps()
        process = context.Process(target=_serve, args=given, name=f"pyvseg-worker-{number}", daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _feed(self) -> None:
        for worker in self.workers:
            while self.waiting and len(worker.jobs) < worker.room and not worker.told and not self.stop.is_set():
                job = self.waiting.popleft()
                worker.jobs[job.name] = job
                _send(worker, job)
            last = "stop" if self.stop.is_set() else "" if self.waiting else "all"
            if worker.room and last and worker.told not in (last, "stop"):
                worker.told = last
                _send(worker, last)

    def _hear(self, worker: _Worker) -> None:
        try:
            kind, news = worker.pipe.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        if kind == "ready":
            worker.room = news
        elif kind == "ended":
            del worker.jobs[news.name]
            self.tell(news)
        elif kind == "error":
            raise news
        elif kind == "busy":
            self.busy.update(news)
        elif kind == "events":
            take(news)
        elif kind == "end":
            self.workers.remove(worker)
            worker.process.join()

    def _bury(self, worker: _Worker) -> None:
        """A process died: others take its videos, the one that began first at last, and a new process takes its place."""
        worker.process.join()
        number = self.workers.index(worker)
        self.deaths[""] += not worker.room
        if self.deaths[""] == _TRIES:
            raise PyvsegError(f"{_TRIES} worker processes died while they loaded the model (exit status {worker.process.exitcode}); use fewer --workers if memory ran out")
        for job in worker.jobs.values():
            self.deaths[job.name] += 1
            if self.deaths[job.name] < _TRIES:
                self.waiting.append(job)
            else:
                why = f"{job.video}: {_TRIES} processes died with this video under way (exit status {worker.process.exitcode}); out of memory?"
                self.tell(Outcome(job.name, str(job.video), why))
        if self.stop.is_set():
            self.workers.remove(worker)
        else:
            self.workers[number] = self._start(number)


def _context():
    """Processes fork off one that has imported everything and done nothing, where the system can: they begin at once."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["pyvseg.engine.batch", "pyvseg.engine.tasks.following"])
    return context


def _send(worker: _Worker, message) -> None:
    try:
        worker.pipe.send(message)
    except OSError:
        pass  # it died; `_hear` will notice


def _serve(pipe: Connection, recipe, out: Path, number: int, count: int, keep: bool) -> None:
    """The life of a worker process."""
    import torch

    from pyvseg.engine.allocator import keep_freed_memory
    from pyvseg.engine.batch import segment

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says when to stop
    keep_freed_memory()
    if torch.cuda.is_available() and getattr(recipe, "device", "") in (None, "cuda"):
        recipe = replace(recipe, device=f"cuda:{number % torch.cuda.device_count()}")
        torch.cuda.set_device(recipe.device)  # else every process takes memory of the first GPU too
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    stop = Event()
    try:
        task = recipe.task()
        # Under way, being finished, and one more, opened ahead: with less, the lanes would wait for a video while the parent waits for them.
        pipe.send(("ready", 2 * task.at_once + 1))
        with recording(keep) as recorder:
            try:
                pipe.send(("busy", segment(_jobs(pipe, stop), task, out, stop, lambda outcome: pipe.send(("ended", outcome)))))
            finally:
                pipe.send(("events", recorder.events or []))
        pipe.send(("end", None))
    except KeyboardInterrupt:
        pipe.send(("end", None))
    except PyvsegError as error:
        pipe.send(("error", error))
    except OSError:
        pass  # nobody listens any more


def _jobs(pipe: Connection, stop: Event) -> Iterator[Job]:
    """Jobs as they come; another thread listens, so that `stop` is heard at any time."""
    heard: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while (message := pipe.recv()) != "stop":
                heard.put(None if message == "all" else message)
        except (EOFError, OSError):  # the parent died: what is under way may end as if by Ctrl-C
            pass
        stop.set()
        heard.put(None)

    threading.Thread(target=listen, daemon=True, name="pyvseg-listen").start()
    return iter(heard.get, None)
