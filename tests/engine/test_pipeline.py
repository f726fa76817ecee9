# SPDX-License-Identifier: Apache-2.0
import threading
import time

import pytest

from pyvseg.engine.pipeline import Background, Prefetch


def test_stages_overlap():
    """Decode, model and write meet at a barrier: nobody passes unless all three are at work at the same time."""
    barrier = threading.Barrier(3, timeout=20)

    def decode():
        for index in range(6):
            if index == 4:
                barrier.wait()
            yield index

    def write(index):
        if index == 0:
            barrier.wait()
        written.append(index)

    written = []
    with Prefetch(decode(), 2) as source, Background(write, 2) as sink:
        for index in source:
            if index == 1:
                barrier.wait()
            sink.put(index)
    assert written == list(range(6))


def test_the_fastest_stage_waits():
    """Queues are bounded, so memory is."""
    decoded, release = [], threading.Event()

    def decode():
        for index in range(100):
            decoded.append(index)
            yield index

    def write(index):
        release.wait(20)

    with Prefetch(decode(), 3) as source, Background(write, 2) as sink:
        pushed = iter(source)
        for _ in range(3):  # one is being written, two wait
            sink.put(next(pushed))
        time.sleep(0.2)
        assert len(decoded) <= 3 + 3 + 1  # taken, waiting, and the one that finds no room
        release.set()
        for index in pushed:
            sink.put(index)
    assert len(decoded) == 100


def test_error_while_decoding_comes_after_the_frames_before_it():
    def decode():
        yield from range(3)
        raise ValueError("frame 3")

    seen = []
    with pytest.raises(ValueError, match="frame 3"), Prefetch(decode(), 2) as source:
        for item in source:
            seen.append(item)
    assert seen == [0, 1, 2]


def test_error_while_writing_stops_the_model_at_once():
    def write(item):
        raise OSError(f"item {item}")

    put = 0
    with pytest.raises(OSError, match="item 0"), Background(write, 2) as sink:
        for item in range(1000):
            sink.put(item)
            put += 1
            time.sleep(0.001)
    assert put < 1000


def test_last_item_may_fail_too():
    def write(item):
        if item == 4:
            raise OSError("item 4")

    with pytest.raises(OSError, match="item 4"), Background(write, 9) as sink:
        for item in range(5):
            sink.put(item)


def test_leaving_early_stops_the_threads():
    def forever():
        while True:
            yield 0

    with pytest.raises(KeyError), Prefetch(forever(), 2) as source, Background(lambda item: None, 2):
        next(iter(source))
        raise KeyError
    assert not [t.name for t in threading.enumerate() if t.name.startswith("pyvseg")]
