# SPDX-License-Identifier: Apache-2.0
"""Stages that overlap in time: decode in one thread, the model in the caller's, write in another, joined by bounded queues.

Decoding, encoding and the model's kernels release the GIL, so threads suffice. Bounded queues keep memory constant: the
fastest stage waits for the slowest.
"""

import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm

_END = object()


class Prefetch:
    """Iterates `iterable` in a thread of its own, at most `depth` items ahead.

    An exception inside the iterable is raised by `next`, after the items that came before it. Use as a context manager:
    leaving it stops the thread.
    """

    def __init__(self, iterable: Iterable, depth: int):
        self._queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._error = None
        self._thread = threading.Thread(target=self._run, args=(iterable,), daemon=True, name="pyvseg-decode")

    def _run(self, iterable: Iterable) -> None:
        try:
            for item in iterable:
                self._queue.put(item)
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._error = error
        self._queue.put(_END)

    def __iter__(self) -> Iterator:
        while (item := self._queue.get()) is not _END:
            yield item
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "Prefetch":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._stop.set()
        while self._thread.is_alive():  # it may wait for room in the queue
            with suppress(queue.Empty):
                self._queue.get(timeout=0.02)
        self._thread.join()


class Background:
    """Calls `consume(item)` in a thread of its own for each item that is `put`, in order, at most `depth` behind.

    The first exception inside `consume` is raised by the next `put`, or on leaving the context. On a normal exit all
    items have been consumed.
    """

    def __init__(self, consume: Callable, depth: int):
        self._consume = consume
        self._queue = queue.Queue(depth)
        self._error = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="pyvseg-write")

    def _run(self) -> None:
        while (item := self._queue.get()) is not _END:
            if self._error is None:  # after an error only empty the queue, so that `put` never hangs
                try:
                    self._consume(item)
                except BaseException as error:
                    self._error = error

    def put(self, item) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    def __enter__(self) -> "Background":
        self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._queue.put(_END)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM (a cluster that wants its machine back) sets, and says so, so that work can stop at a
    good moment; the second one interrupts at once.

    Outside the main thread, where Python allows no signal handlers, the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum, frame):
        stop.set()
        restore()
        tqdm.write("stopping at the end of this clip (Ctrl-C again: at once)", file=sys.stderr)

    def restore():
        for number, before in previous.items():
            signal.signal(number, before)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()
