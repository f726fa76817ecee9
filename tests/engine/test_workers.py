# SPDX-License-Identifier: Apache-2.0
"""A batch in several processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing import active_children

import pytest

from pyvseg.engine.output import VideoOutput
from pyvseg.engine.workers import Workers
from pyvseg.errors import OutputError
from tests.conftest import ROOT
from tests.engine.standin import StandinRecipe
from tests.engine.test_batch import LENGTHS, clips, files, go, jobs_of, notes, undisturbed  # noqa: F401  (two are fixtures)


def test_two_processes_and_one_killed(clips, tmp_path, undisturbed):  # noqa: F811
    """Whoever takes over a dead process' videos gives the same results."""
    out, killed = tmp_path / "out", []

    def kill():
        while not any((out / "unfinished").glob("*/masks/*.png")):
            time.sleep(0.005)
        killed.append(active_children()[0].pid)
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    report = go(clips, out, StandinRecipe(delay=0.01), execute=Workers(2), profile=tmp_path / "trace.json")
    assert killed and (report.done, report.failed, report.frames) == (6, [], 64)
    assert files(out) == undisturbed and {"decode", "model", "write"} <= set(report.busy)
    assert not active_children()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert os.getpid() not in {e["pid"] for e in events}  # and what the dead one did is not known
    assert {"decode", "model", "write"} <= {e["name"] for e in events} and min(e["ts"] for e in events) == 0


class Deadly(StandinRecipe):
    """The process dies of the video c."""

    def task(self):
        def fit(video, objects, at_once):
            if video.name == "c":
                os.kill(os.getpid(), signal.SIGKILL)
            return 5, at_once

        return replace(super().task(), fit=fit)


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_video_that_kills_its_process(clips, tmp_path, undisturbed, at_once):  # noqa: F811
    """Those that were in line behind it do not fail for its sake."""
    report = go(clips, tmp_path / "out", Deadly(at_once=at_once), execute=Workers(2))
    assert (report.done, [each.name for each in report.failed]) == (5, ["c"]) and "3 processes died of this video" in report.failed[0].reason
    assert files(tmp_path / "out") == {k: v for k, v in undisturbed.items() if k[0] != "c"} and 0 < report.busy["model"] <= 1


RUN = """
import sys
from pathlib import Path
from pyvseg.engine.output import Interrupted
from pyvseg.engine.workers import Workers
from tests.engine.standin import StandinRecipe
from tests.engine.test_batch import go
try:
    go(Path(sys.argv[1]), Path(sys.argv[2]), StandinRecipe(delay=0.1), execute=Workers(2))
except Interrupted as stopped:
    print(stopped)
"""


def interrupted(clips, out, moment) -> str:  # noqa: F811
    process = subprocess.Popen([sys.executable, "-c", RUN, str(clips), str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not moment():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return told


def test_ctrl_c(clips, tmp_path, undisturbed):  # noqa: F811
    """It reaches all processes of the group, as in a terminal; every one suspends what it is at."""
    out = tmp_path / "out"
    told = interrupted(clips, out, lambda: out.exists() and time.sleep(0.3) is None)  # while the first process begins
    assert "0 of 6 videos are finished and kept, 6 remain" in told
    longest = max(LENGTHS, key=LENGTHS.get)  # it takes seconds after its first clip
    assert "videos are finished and kept" in interrupted(clips, out, lambda: any((out / "unfinished" / longest).glob("masks/*.png")))
    kept = len([note for note in notes(out) if note["status"] == "done"])
    assert list((out / "unfinished").glob("*/state-*"))
    report = go(clips, out, StandinRecipe())
    assert (report.before, report.done) == (kept, 6 - kept) and report.frames < 64
    assert files(out) == undisturbed


class Refused(StandinRecipe):
    """The disk refuses the results of a when b is under way, c is open, and no other video has been sent."""

    def task(self):
        finish = VideoOutput.finish

        def refusing(output, keep=None):
            if output.name == "a":
                time.sleep(0.5)
                raise OutputError("cannot write a")
            finish(output, keep)

        VideoOutput.finish = refusing
        return super().task()


def test_a_refusal_while_no_job_is_on_its_way(clips, tmp_path):  # noqa: F811
    jobs = jobs_of(clips)
    more = [replace(job, name=f"{job.name}{n}") for n in range(3) for job in jobs]
    with pytest.raises(OutputError, match="cannot write a; . of 24 videos are finished and kept"):
        go([*jobs, *more], tmp_path / "out", Refused(delay=0.02), execute=Workers(2))


def test_failures_are_told(clips, tmp_path):  # noqa: F811
    jobs = jobs_of(clips)[:2]
    (tmp_path / "bad.mp4").write_bytes(b"x")
    report = go([*jobs, type(jobs[0])("bad", tmp_path / "bad.mp4", jobs[0].masks)], tmp_path / "out", execute=Workers(2))
    assert report.done == 2 and "cannot be read" in report.failed[0].reason
    (tmp_path / "out" / "unfinished").write_text("no folder can be made here")
    with pytest.raises(OutputError, match="cannot write .*2 of 4 videos are finished and kept, 1 failed, 1 remain"):
        go([*jobs, type(jobs[0])("bad", tmp_path / "bad.mp4", jobs[0].masks), jobs_of(clips)[3]], tmp_path / "out", execute=Workers(2))
    assert len(notes(tmp_path / "out")) == 3
