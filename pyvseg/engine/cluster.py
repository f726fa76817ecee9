# SPDX-License-Identifier: Apache-2.0
"""A batch on a Ray cluster: one task for each video. Placement, scaling and what happens when a process or a machine dies are Ray's.

Every machine sees inputs, weights and OUT under the same paths (a shared file system), and has pyvseg installed.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from pyvseg.engine.jobs import Job
from pyvseg.engine.manifest import Outcome
from pyvseg.engine.trace import Span, keeps, recording, take
from pyvseg.errors import PyvsegError

_RETRIES = 3  # of a video whose process or machine dies
_PATIENCE = 30  # seconds, for a cluster that does not answer any more
_AHEAD = 2  # tasks that wait for each one that can run: Ray's scaling goes by what waits

_loaded: dict = {}  # in a worker process: the model of its last task


@dataclass(frozen=True)
class Cluster:
    """Executes a batch (`pyvseg.engine.batch.Execute`) on the cluster at `address`; "auto" is the one that this machine belongs to.

    cpus, gpus: what each video takes. Raises PyvsegError where Ray is missing or does not answer.
    """

    address: str = "auto"
    cpus: float = 1
    gpus: float = 0

    def __call__(self, jobs: list[Job], recipe, out: Path, stop: Event, tell: Callable[[Outcome], None]) -> dict[str, float]:
        ray = _connect(self.address)
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=_RETRIES)(_segment)
        watch = Watch(self.address, getattr(ray.get_runtime_context(), "gcs_address", self.address))
        shared, waiting, under_way, busy, spent = ray.put(recipe), iter(jobs), {}, Counter(), 0.0
        try:
            while not stop.is_set():
                if not watch.answers():
                    stop.wait(1)
                    continue
                room = int(_AHEAD * max(1, ray.cluster_resources().get("CPU", 0) // self.cpus)) - len(under_way)
                for job in _first(waiting, room):
                    under_way[task.remote(job, shared, out.absolute(), self.cpus, keeps())] = job
                if not under_way:
                    break
                for ready in ray.wait(list(under_way), timeout=0.5)[0]:
                    outcome, shares, events = _result(ray, ready, under_way.pop(ready))
                    tell(outcome)
                    spent += outcome.seconds
                    busy.update({name: share * outcome.seconds for name, share in shares.items()})
                    take(events)
        finally:
            with suppress(Exception):  # a dead cluster knows nothing of them any more
                for each in under_way:
                    ray.cancel(each, force=True)
        return {name: seconds / max(spent, 1e-9) for name, seconds in busy.items()}


def _connect(address: str):
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what the user should know of it, we say
    try:
        import ray
    except ImportError:
        raise PyvsegError("--ray needs Ray: pip install 'pyvseg[ray]'") from None
    if not ray.is_initialized():
        try:
            _knock(address)  # Ray itself would try for minutes
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise PyvsegError(f"--ray {address}: no Ray cluster answers there ({str(error).splitlines()[0]}); start one with `ray start --head`") from None
    return ray


@dataclass
class Watch:
    """Whether the cluster's head still answers: without it Ray's calls would hang, and end this program after a minute."""

    address: str
    head: str
    heard: float = field(default_factory=time.monotonic)

    def answers(self) -> bool:
        """Raises PyvsegError after half a minute without an answer."""
        try:
            _knock(self.head)
        except OSError as error:
            if time.monotonic() - self.heard > _PATIENCE:
                raise PyvsegError(f"--ray {self.address}: the Ray cluster does not answer any more ({error})") from None
            return False
        self.heard = time.monotonic()
        return True


def _knock(address: str) -> None:
    """Raises OSError where HOST:PORT does not answer; other addresses are Ray's to judge."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _first(items: Iterable[Job], count: int) -> list[Job]:
    return [job for _, job in zip(range(count), items)]


def _result(ray, ready, job: Job) -> tuple[Outcome, dict[str, float], list[Span]]:
    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PyvsegError):
            raise type(error.cause)(str(error.cause)) from None
        raise
    except ray.exceptions.RayError as error:  # the process or the machine died too often
        return Outcome(job.name, job.source, f"{job.source}: {type(error).__name__}: {str(error).splitlines()[0]}"), {}, []


def _segment(job: Job, recipe, out: Path, cpus: float, keep: bool) -> tuple[Outcome, dict[str, float], list[Span]]:
    """The task: one video, with the model of the task before if it is the same. Returns how it ended, busy shares, and spans."""
    import torch

    from pyvseg.engine.batch import segment

    torch.set_num_threads(max(1, int(cpus)))
    if recipe not in _loaded:
        _loaded.clear()
        _loaded[recipe] = recipe.task()
    outcomes: list[Outcome] = []
    with recording(keep) as recorder:
        busy = segment([job], _loaded[recipe], out, Event(), outcomes.append)
    host = f"{socket.gethostname()} {os.getpid()}"
    return outcomes[0], busy, [each._replace(process=host) for each in recorder.events or []]

