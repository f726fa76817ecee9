# SPDX-License-Identifier: Apache-2.0
"""A batch in several processes of one machine: one for each GPU, or shares of the CPU.

Each loads the model and runs the jobs that it is sent; only this process writes the manifest. A process that dies is replaced,
and its videos are given to others.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods, get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event

from tqdm import tqdm

from pyvseg.engine.jobs import Job
from pyvseg.engine.manifest import Outcome
from pyvseg.engine.trace import keeps, recording, take
from pyvseg.errors import OutputError, PyvsegError

_TRIES = 3  # of a video whose process dies


@dataclass
class _Worker:
    number: int  # says which GPU it has
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
    busy: Counter = field(default_factory=Counter)  # seconds by stage, of all processes together
    spent: float = 0.0  # seconds that these have run

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
                self._last_words(worker)
        return {name: seconds / self.spent for name, seconds in self.busy.items()}

    def _start(self, number: int) -> _Worker:
        context = _context()
        ours, theirs = context.Pipe()
        given = theirs, self.recipe, self.out, number, self.count, keeps()
        process = context.Process(target=_serve, args=given, name=f"pyvseg-worker-{number}", daemon=True)
        with _deaf():
            process.start()
        theirs.close()
        return _Worker(number, process, ours)

    def _feed(self) -> None:
        for worker in self.workers:
            alone = False
            while self.waiting and len(worker.jobs) < worker.room and not (worker.told or alone or self.stop.is_set()):
                alone = self.deaths[self.waiting[0].name] > 0
                if alone and worker.jobs:
                    break
                job = self.waiting.popleft()
                worker.jobs[job.name] = job
                _send(worker, job)
            last = "stop" if self.stop.is_set() else "all" if alone and worker.jobs or not self.waiting else ""
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
            worker.room, self.deaths[""] = news, 0
        elif kind == "ended":
            del worker.jobs[news.name]
            self.tell(news)
        elif kind == "error":
            raise news
        elif kind == "busy":
            shares, seconds = news
            self.busy.update({name: share * seconds for name, share in shares.items()})
            self.spent += seconds
        elif kind == "events":
            take(news)
        elif kind == "end":
            worker.process.join()
            self._replace(worker)

    def _last_words(self, worker: _Worker) -> None:
        """Takes note of what a process finished that has been stopped."""
        with suppress(EOFError, OSError, OutputError):
            while worker.pipe.poll():
                kind, news = worker.pipe.recv()
                if kind == "ended":
                    self.tell(news)

    def _bury(self, worker: _Worker) -> None:
        """A process died: its videos are tried again when all others are done, each by itself, so that none fails for another's sake."""
        worker.process.join()
        self.deaths[""] += not worker.room
        if self.deaths[""] == _TRIES:
            raise PyvsegError(f"{_TRIES} worker processes died while they loaded the model (exit status {worker.process.exitcode}); use fewer --workers if memory ran out")
        for job in worker.jobs.values():
            self.deaths[job.name] += 1
            if self.deaths[job.name] < _TRIES:
                self.waiting.append(job)
            else:
                why = f"{job.source}: {_TRIES} processes died of this video (exit status {worker.process.exitcode}); out of memory?"
                self.tell(Outcome(job.name, job.source, why))
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        """Puts a new process into the place of one that has ended, if there is work for it."""
        number = self.workers.index(worker)
        worker.pipe.close()
        if self.waiting and not self.stop.is_set():
            self.workers[number] = self._start(worker.number)
        else:
            del self.workers[number]


def _context():
    """Processes fork off one that has imported everything and done nothing, where the system can: they begin at once."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["pyvseg.engine.batch", "pyvseg.engine.tasks.following"])
    return context


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that begin now will not hear Ctrl-C and SIGTERM, which reach the whole group: this one says when to stop."""
    resource_tracker.ensure_running()  # which would make this process hear them again
    signals = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    from pyvseg.engine.memory import share

    tqdm.set_lock(threading.RLock())  # its own one is shared by processes, and left over where one is killed
    keep_freed_memory()
    share(count)
    if (gpus := torch.cuda.device_count()) and getattr(recipe, "device", "") in (None, "cuda"):
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or range(gpus)
        os.environ["CUDA_VISIBLE_DEVICES"] = str(visible[number % gpus])  # for all threads of this process, NVDEC's too; CUDA has not begun yet
        share(-(-count // gpus))
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    stop = Event()
    try:
        task = recipe.task()
        # Under way, being finished, and one more, opened ahead: with less, the lanes would wait for a video while the parent waits for them.
        pipe.send(("ready", 2 * task.at_once + 1))
        with recording(keep) as recorder:
            try:
                began = time.perf_counter()
                shares = segment(_jobs(pipe, stop), task, out, stop, lambda outcome: pipe.send(("ended", outcome)))
                pipe.send(("busy", (shares, time.perf_counter() - began)))
            finally:
                pipe.send(("events", recorder.events or []))
        pipe.send(("end", None))
    except KeyboardInterrupt:
        pipe.send(("end", None))
    except PyvsegError as error:
        pipe.send(("error", error))
    except OSError:
        pass  # nobody listens any more


def _jobs(pipe: Connection, stop: Event) -> Iterator[Job | None]:
    """Jobs as they come, None while there is none; another thread listens, so that `stop` is heard at any time."""
    heard: queue.SimpleQueue[Job | str] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while (message := pipe.recv()) != "stop":
                heard.put(message)
        except (EOFError, OSError):  # the parent died, and the same command may have begun again: nobody else may write there
            os._exit(1)
        stop.set()
        heard.put("all")

    threading.Thread(target=listen, daemon=True, name="pyvseg-listen").start()
    while True:
        try:
            job = heard.get(timeout=0.2)
        except queue.Empty:
            job = None
        if job == "all":
            return
        yield job
