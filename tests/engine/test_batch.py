# SPDX-License-Identifier: Apache-2.0
"""Batches of small videos with a stand-in for the network: what is done, noted and left when something goes wrong."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pyvseg.engine import memory
from pyvseg.engine.batch import batch
from pyvseg.engine.jobs import Job
from pyvseg.engine.lanes import drive
from pyvseg.engine.output import Interrupted
from pyvseg.engine.tasks import following as engine
from pyvseg.errors import OutputError, PyvsegError, VideoError
from pyvseg.models import zoo
from pyvseg.models.stcn import STCN
from pyvseg.video import open_video, png
from pyvseg.video.writer import PngWriter
from tests.conftest import ROOT
from tests.engine.standin import StandinRecipe
from tests.video.clips import images, square, write_video

LENGTHS = {"a": 7, "b": 23, "c": 5, "d": 12, "e": 1, "f": 16}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, count in LENGTHS.items():
        write_video(folder / f"{name}.mp4", images(count))
    return folder


def jobs_of(folder: Path) -> list[Job]:
    return [Job(path.stem, path, {0: square()}) for path in sorted(folder.glob("*.mp4"))]


def go(folder, out, recipe=StandinRecipe(), **options):
    return batch(jobs_of(folder) if isinstance(folder, Path) else folder, recipe, out, progress=False, **options)


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and not p.name.startswith("manifest")}


def notes(out: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(out.glob("manifest*.jsonl")) for line in path.read_text().splitlines()][1:]


@pytest.fixture(scope="module")
def undisturbed(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    report = go(clips, out)
    assert (report.done, report.frames, report.failed) == (6, 64, [])
    return files(out)


def test_each_video_in_its_folder(clips, tmp_path):
    report = go(clips, tmp_path / "out", profile=tmp_path / "trace.json")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*"abcdef", "manifest.jsonl"]
    for name, count in LENGTHS.items():
        assert sorted(p.name for p in (tmp_path / "out" / name).iterdir()) == ["masks", "masks.json", "overlay.mp4"]
        assert len(list((tmp_path / "out" / name / "masks").iterdir())) == count
    assert [(n["name"], n["status"], n["frames"]) for n in notes(tmp_path / "out")] == [(k, "done", v) for k, v in LENGTHS.items()]
    assert {"decode", "model", "write"} <= set(report.busy) and 0 < report.busy["model"] <= 1 and report.fps > 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {e["name"] for e in events} >= {"decode", "model", "write"} and len({e["tid"] for e in events}) > 3
    assert {e["args"]["video"] for e in events if "args" in e} == set(LENGTHS)
    again = go(clips, tmp_path / "out")
    assert (again.before, again.done, again.frames) == (6, 0, 0)


@pytest.mark.parametrize("at_once", [2, 4])
def test_several_at_once_give_the_same_results(clips, tmp_path, undisturbed, at_once):
    go(clips, tmp_path / "out", StandinRecipe(at_once=at_once))
    assert files(tmp_path / "out") == undisturbed


def test_a_broken_video_stops_nothing(clips, tmp_path, undisturbed):
    folder = tmp_path / "clips"
    folder.mkdir()
    for path in clips.iterdir():
        os.link(path, folder / path.name)
    whole = (clips / "b.mp4").read_bytes()
    for name, data in (("b", whole[: len(whole) // 2]), ("e", b"no video")):
        (folder / f"{name}.mp4").unlink()
        (folder / f"{name}.mp4").write_bytes(data)
    jobs = [*jobs_of(folder), Job("gone", folder / "gone.mp4", {0: square()}), Job("blank", folder / "a.mp4", None)]
    report = go(jobs, tmp_path / "out", StandinRecipe(at_once=2))
    assert report.done == 4 and [o.name for o in report.failed] == ["b", "e", "gone", "blank"]
    assert all(word in o.reason for word, o in zip(("cut short", "cannot be read", "no such", "no mask"), report.failed))
    assert files(tmp_path / "out") == {k: v for k, v in undisturbed.items() if k[0] not in "be"}
    again = go(jobs, tmp_path / "out")
    assert (again.before, again.done, len(again.skipped)) == (4, 0, 4)
    (folder / "b.mp4").write_bytes(whole)
    mended = go(jobs, tmp_path / "out", retry_failed=True)
    assert (mended.done, len(mended.failed)) == (1, 3)
    assert go(jobs, tmp_path / "out").before == 5


# A process that has imported everything forks a batch for each line that it is given, kills it at the next line and tells
# the signal that it died of. It kills before it asks for the end, so that the id cannot have become somebody else's.
FORKS = """
import os, signal, sys
from pathlib import Path
from tests.engine.standin import StandinRecipe
from tests.engine.test_batch import go
while line := sys.stdin.readline():
    clips, out, at_once, delay = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if not child:
        go(Path(clips), Path(out), StandinRecipe(delay=float(delay), at_once=int(at_once)))
        os._exit(0)
    sys.stdin.readline()
    os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def begin():
    """begin(clips, out, at_once, delay) starts a batch in a process of its own; it returns a function that kills it and returns the signal that it died of."""
    process = subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(*arguments):
        print(*arguments, sep="\t", file=process.stdin, flush=True)
        return kill

    def kill():
        print(file=process.stdin, flush=True)
        return os.WTERMSIG(int(process.stdout.readline()))

    yield start
    process.stdin.close()
    process.wait()


def test_killed_at_any_moment(clips, tmp_path, undisturbed, begin):
    """kill -9, twenty times; every now and then a run finishes exactly the rest."""
    moments, killed, tries = random.Random(4), 0, 0
    while killed < 20 and tries < 60:
        out = tmp_path / f"out{tries // 4}"  # four kills on the way to one result
        kill = begin(clips, out, 1 + tries % 2, 0.004)
        time.sleep(moments.uniform(0, 0.35))
        killed += kill() == signal.SIGKILL
        tries += 1
        if tries % 4 == 0 or killed == 20:
            finished = [note["name"] for note in notes(out)] if (out / "manifest.jsonl").exists() else []
            whole = {k: v for k, v in files(out).items() if k[0] in finished}
            report = go(clips, out)
            assert (report.before, report.done) == (len(finished), 6 - len(finished))
            assert files(out) == undisturbed == undisturbed | whole
    assert killed == 20


@pytest.fixture
def interrupted(clips, tmp_path, monkeypatch):
    """OUT after Ctrl-C in b."""
    step, seen = engine.FollowingLane.step, []

    def stepping(lane):
        seen.append(lane.name)
        if len(seen) == 4:
            signal.raise_signal(signal.SIGINT)
        step(lane)

    monkeypatch.setattr(engine.FollowingLane, "step", stepping)
    with pytest.raises(Interrupted, match="1 of 6 videos are finished and kept, 5 remain, the same command goes on"):
        go(clips, tmp_path / "out")
    monkeypatch.undo()
    return tmp_path / "out"


def test_interrupted_goes_on(clips, interrupted, undisturbed):
    (interrupted / "unfinished" / "b" / ".masks.json.left").mkdir()  # by a run that went on and was killed
    report = go(clips, interrupted)
    assert (report.before, report.done) == (1, 5) and report.frames < 57  # b went on where it was
    assert files(interrupted) == undisturbed


def test_a_suspended_video_with_other_masks_begins_again(clips, interrupted, tmp_path):
    jobs = [replace(job, masks={0: square(2)}) if job.name == "b" else job for job in jobs_of(clips)]
    assert go(jobs, interrupted).frames == 57
    go(jobs[1:2], tmp_path / "fresh")
    assert {k: v for k, v in files(interrupted).items() if k[0] == "b"} == files(tmp_path / "fresh")


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses(clips, tmp_path, undisturbed, monkeypatch, reason):
    """Finished videos stay, nothing half-written does, and the message says what remains."""
    encode, written = png.encode_labels, []

    def fill(*given):
        written.append(given)
        if len(written) > 32:
            raise OSError(reason, os.strerror(reason))
        return encode(*given)

    monkeypatch.setattr(png, "encode_labels", fill)
    with pytest.raises(OutputError, match=rf"{os.strerror(reason)}.*\d of 6 videos are finished and kept, \d remain, the same command goes on"):
        go(clips, tmp_path / "out")
    finished = [note["name"] for note in notes(tmp_path / "out")]
    assert "a" in finished and files(tmp_path / "out") == {k: v for k, v in undisturbed.items() if k[0] in finished}
    monkeypatch.setattr(png, "encode_labels", encode)
    assert go(clips, tmp_path / "out").done == 6 - len(finished) and files(tmp_path / "out") == undisturbed


def test_unwritable(clips, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write .*file"):
        go(clips, tmp_path / "file" / "out")


def test_a_slow_disk_holds_everything_back(clips, tmp_path, monkeypatch):
    """While the writer is stuck, decoder and model come to rest: what waits between them does not depend on the video."""
    write_video(tmp_path / "long.mp4", images(300))
    release, decoded, write = threading.Event(), [], PngWriter.write
    frames_of = engine.frames_with_masks

    def counted(*given):
        for frame in frames_of(*given):
            decoded.append(frame.index)
            yield frame

    monkeypatch.setattr(engine, "frames_with_masks", counted)
    monkeypatch.setattr(PngWriter, "write", lambda writer, result: release.wait(60) and write(writer, result))
    runs = threading.Thread(target=go, args=(jobs_of(tmp_path), tmp_path / "out"))
    runs.start()
    before = -1
    while not decoded or before != len(decoded):
        before = len(decoded)
        time.sleep(0.3)
    assert 10 <= len(decoded) <= 45  # two queues of 10, three turns of 5, and one in each hand
    release.set()
    runs.join(60)
    assert len(decoded) == 300 and len(list((tmp_path / "out" / "long" / "masks").iterdir())) == 300


def test_other_settings_are_refused(clips, tmp_path, undisturbed):
    go(clips, tmp_path / "out", StandinRecipe(7))
    before = files(tmp_path / "out")
    with pytest.raises(OutputError, match="other settings: clip_length was 7 and is now 5; .*--overwrite"):
        go(clips, tmp_path / "out")
    assert files(tmp_path / "out") == before
    go(clips, tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == undisturbed


def test_folders_that_are_not_ours(clips, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="already holds other files"):
        go(clips, tmp_path / "out")
    with pytest.raises(OutputError, match="is a file"):
        go(clips, tmp_path / "out" / "mine.txt")
    go(clips, tmp_path / "out", overwrite=True)
    elsewhere = [Job("a", clips / "c.mp4", {0: square()})]
    with pytest.raises(PyvsegError, match="a is of .*a.mp4; .*c.mp4 would replace it"):
        go(elsewhere, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").exists()


def test_clips_that_do_not_fit_are_shortened(clips, tmp_path, undisturbed):
    """The stand-in's masks move once in each clip, so the clip length shows."""

    class Recipe(StandinRecipe):
        def task(self):
            return replace(super().task(), fit=lambda video, objects, at_once: (3 if video.name == "b" else 5, at_once))

    report = go(clips, tmp_path / "out", Recipe())
    assert [remark.split(": ")[1] for remark in report.remarks] == ["clip length 3 in place of 5, which would not fit into memory"]
    go(jobs_of(clips)[1:2], tmp_path / "three", StandinRecipe(3))
    found = files(tmp_path / "out")
    assert all(found[k] == v for k, v in undisturbed.items() if k[0] != "b")
    assert {k: v for k, v in found.items() if k[0] == "b"} == files(tmp_path / "three")


def test_clip_lengths_that_fit(clips, monkeypatch):
    network = STCN(zoo.variant("pcvos_tiny").settings).eval()
    video = open_video(clips / "a.mp4")
    needed = [memory.clip_bytes(network, video, length, 3, 16) for length in (1, 5, 25)]
    assert needed == sorted(needed)
    for free, length in ((1e18, 25), (needed[1] / 0.8 + 1, 5), (needed[0] / 0.8 + 1, 1)):
        monkeypatch.setattr(memory, "total", lambda device, free=free: free)
        assert memory.fitting_clip(network, video, 25, 3, 16) == (length, 1)
    monkeypatch.setattr(memory, "total", lambda device: 2 * needed[2] / 0.8)
    assert memory.fitting_clip(network, video, 25, 3, 16, at_once=2) == (25, 2)
    monkeypatch.setattr(memory, "total", lambda device: needed[2] / 0.8 + 1)
    assert memory.fitting_clip(network, video, 25, 3, 16, at_once=2) == (25, 1)  # rather alone than with shorter clips
    monkeypatch.setattr(memory, "_sharers", 2)
    monkeypatch.setattr(memory, "total", lambda device: 2 * needed[1] / 0.8 + 2)
    assert memory.fitting_clip(network, video, 25, 3, 16) == (5, 1)
    monkeypatch.setattr(memory, "total", lambda device: 1000)
    with pytest.raises(VideoError, match="a.mp4: 3 objects in frames of 64x48 take .* even frame by frame"):
        memory.fitting_clip(network, video, 25, 3, 16)


class Alone:
    """A lane of one turn that needs all the room, or does not."""

    def __init__(self, name, alone, seen):
        self.name, self.alone, self.seen = name, alone, seen
        self.at_end = self.idle = False
        self.done, self.note = 0, ""

    def open(self):
        pass

    def fill(self):
        self.at_end, self.idle, self.done = self.done == 2, self.done == 2, min(self.done + 1, 2)

    def step(self):
        pass

    def complete(self):
        return True

    def abandon(self, error):
        return error


def test_a_video_that_has_to_be_alone():
    turns, errors = [], []
    together = lambda lanes: turns.append("".join(lane.name for lane in lanes))  # noqa: E731
    drive("abCdE", lambda name: Alone(name, name.isupper(), turns), together, lambda name, error: errors.append(error), at_once=3, stop=threading.Event())
    assert set(turns) == {"ab", "C", "d", "E"} and errors == [None] * 5
