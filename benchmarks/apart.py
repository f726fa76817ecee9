# SPDX-License-Identifier: Apache-2.0
"""Ways to compute the same thing, each in a process of its own that stays alive, so that rounds can still go through them in turn.

What one way sets for its whole process, the allocator above all, would else flatter or slow the others.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

from pyvseg.engine.allocator import keep_freed_memory

T = TypeVar("T")

_run: Callable


class Apart:
    """The callable that `build(*args)` makes, in a process of its own; what goes in and out is pickled. Errors are raised here.

    threads      of PyTorch there
    keep_freed   with the allocator as `pyvseg run` sets it, not as PyTorch leaves it to its users
    """

    def __init__(self, build: Callable[..., Callable], *args, threads: int, keep_freed: bool) -> None:
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._there(_build, build, args, threads, keep_freed)

    def __call__(self, *args):
        return self._there(_call, args)

    def peak_memory(self) -> int:
        """Bytes that the process has had in memory at most."""
        return self._there(_peak_memory)

    def close(self) -> None:
        self._process.shutdown()

    def _there(self, function: Callable, *args):
        return self._process.submit(function, *args).result()


def in_turn(runs: dict[str, Callable[[], T]], rounds: int, *, cost: Callable[[T], float] = lambda stages: sum(stages.values()), warm_up: int = 2) -> dict[str, T]:
    """What the best run of each returns, seconds by stage unless `cost` says otherwise. The first `warm_up` rounds do not count: one has
    nothing to build on, and the next may meet code that nothing has loaded yet."""
    found = [{name: run() for name, run in runs.items()} for _ in range(warm_up + rounds)]
    return {name: min((each[name] for each in found[warm_up:]), key=cost) for name in runs}


def _build(build: Callable[..., Callable], args: tuple, threads: int, keep_freed: bool) -> None:
    global _run
    torch.set_num_threads(threads)
    if keep_freed:
        keep_freed_memory()
    _run = build(*args)


def _call(args: tuple):
    return _run(*args)


def _peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
