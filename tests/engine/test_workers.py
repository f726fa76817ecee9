# SPDX-License-Identifier: Apache-2.0
"""A batch in several processes."""

import os
import signal
import threading
import time
from multiprocessing import active_children

import pytest

from pyvseg.engine.workers import Workers
from pyvseg.errors import OutputError
from tests.engine.standin import StandinRecipe
from tests.engine.test_batch import clips, files, go, jobs_of, notes, undisturbed  # noqa: F401  (two are fixtures)


def test_two_processes_and_one_killed(clips, tmp_path, undisturbed):  # noqa: F811
    """Whoever takes over a dead process' videos gives the same results."""
    out, killed = tmp_path / "out", []

    def kill():
        while not any((out / "unfinished").glob("*/masks/*.png")):
            time.sleep(0.005)
        killed.append(active_children()[0].pid)
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    report = go(clips, out, StandinRecipe(delay=0.01), execute=Workers(2))
    assert killed and (report.done, report.failed, report.frames) == (6, [], 64)
    assert files(out) == undisturbed and {"decode", "model", "write"} <= set(report.busy)
    assert not active_children()


def test_failures_are_told(clips, tmp_path):  # noqa: F811
    jobs = jobs_of(clips)[:2]
    (tmp_path / "bad.mp4").write_bytes(b"x")
    report = go([*jobs, type(jobs[0])("bad", tmp_path / "bad.mp4", jobs[0].masks)], tmp_path / "out", execute=Workers(2))
    assert report.done == 2 and "cannot be read" in report.failed[0].reason
    (tmp_path / "out" / "unfinished").write_text("no folder can be made here")
    with pytest.raises(OutputError, match="cannot write .*2 of 4 videos are finished and kept, 1 remain"):
        go([*jobs, type(jobs[0])("bad", tmp_path / "bad.mp4", jobs[0].masks), jobs_of(clips)[3]], tmp_path / "out", execute=Workers(2))
    assert len(notes(tmp_path / "out")) == 3
