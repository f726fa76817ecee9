# SPDX-License-Identifier: Apache-2.0
"""What each stage is busy with, and when: shares for a report, and a trace that Chrome and Perfetto open."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pyvseg.video.writer import output_errors


STAGES = "decode", "model", "write"  # other spans are parts of the model's


class Span(NamedTuple):
    """A span; `start` in seconds since 1970, so that those of several processes and machines fit together."""

    name: str
    detail: str
    process: str | int
    thread: int
    start: float
    length: float


class Recorder:
    """Adds up the seconds of each span by name; with `keep` it remembers every span for `save`, about 100 bytes each."""

    def __init__(self, keep: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()
        self.events: list[Span] | None = [] if keep else None
        self._epoch = time.time() - self.started
        self._lock = threading.Lock()

    def restart(self) -> None:
        """Forgets what has been, a model's loading for instance."""
        with self._lock:
            self.seconds, self.started = {}, time.perf_counter()

    def add(self, name: str, detail: str, start: float, end: float) -> None:
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + end - start
            if self.events is not None:
                self.events.append(Span(name, detail, os.getpid(), threading.get_native_id(), self._epoch + start, end - start))

    def shares(self) -> dict[str, float]:
        """Busy seconds of each name per second since the recorder was made; above 1 where several threads share a stage."""
        wall = time.perf_counter() - self.started
        return {name: seconds / wall for name, seconds in self.seconds.items()}

    def save(self, path: Path) -> None:
        """Chrome's trace event format, times in microseconds. Raises OutputError."""
        events = self.events or []
        first = min((each.start for each in events), default=0)
        with output_errors(path), open(path, "w", encoding="utf-8") as out:
            for n, (name, detail, process, thread, start, length) in enumerate(events):
                event = {"name": name, "cat": "pyvseg", "ph": "X", "pid": process, "tid": thread, "ts": 1e6 * (start - first), "dur": 1e6 * length}
                out.write(("," if n else '{"traceEvents":[') + json.dumps(event | ({"args": {"video": detail}} if detail else {})) + "\n")
            out.write("]}\n" if events else '{"traceEvents":[]}\n')


_recorder: Recorder | None = None


def keeps() -> bool:
    """Whether the spans of this process are remembered."""
    return _recorder is not None and _recorder.events is not None


def take(events: list[Span]) -> None:
    """Remembers the spans of another process beside one's own."""
    if keeps():
        _recorder.events.extend(events)


@contextmanager
def recording(keep: bool = False) -> Iterator[Recorder]:
    """Spans of the whole process go to this recorder while this lasts; inside another `recording`, to that one's."""
    global _recorder
    outer, _recorder = _recorder, _recorder or Recorder(keep)
    try:
        yield _recorder
    finally:
        _recorder = outer


@contextmanager
def span(name: str, detail: str = "") -> Iterator[None]:
    """Something that a thread is busy with; costs nothing worth speaking of where nobody records."""
    recorder = _recorder
    if recorder is None:
        yield
        return
    start = time.perf_counter()
    try:
        yield
    finally:
        recorder.add(name, detail, start, time.perf_counter())


def spans(name: str, items: Iterable, detail: str = "") -> Iterator:
    """The same items; the time that each takes to come is a span."""
    iterator = iter(items)
    while True:
        with span(name, detail):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
