# SPDX-License-Identifier: Apache-2.0
"""The notes of batches: damaged, shared, of other settings."""

import errno
import fcntl
import os
import time

import pytest

from pyvseg.engine.manifest import Manifest, Outcome
from pyvseg.errors import OutputError
from tests.engine.test_batch import begin, clips, files, go, notes, undisturbed  # noqa: F401  (three are fixtures)

DONE, FAILED = Outcome("a", "a.mp4", None, 10, 2.0, "shorter clips"), Outcome("a", "a.mp4", "a.mp4: broken")


def write(out, *outcomes, settings=(("clip_length", 5),), **options) -> Manifest:
    """A manifest that stays open, so that it is in use."""
    manifest = Manifest(out, dict(settings), **options)
    for outcome in outcomes:
        manifest.add(outcome)
    return manifest


def test_what_is_noted_is_read_again(tmp_path):
    write(tmp_path, DONE).close()
    again = write(tmp_path)
    assert again.outcomes == {"a": DONE} and notes(tmp_path)[0]["fps"] == 5


def test_done_outweighs_a_failure_elsewhere(tmp_path):
    """A video that failed in one division of the work may be mended in another, whatever the files are called."""
    write(tmp_path, FAILED, part="-2-of-3").close()
    write(tmp_path, DONE, part="-1-of-2").close()
    write(tmp_path, FAILED).close()
    assert write(tmp_path).outcomes == {"a": DONE}


@pytest.mark.parametrize("outcomes", [[], [FAILED]])
def test_settings_that_made_nothing_stand_in_nobodys_way(tmp_path, outcomes):
    """A mistyped option, for instance."""
    write(tmp_path, *outcomes, settings={"weights": "wrong.pth"}).close()
    assert write(tmp_path, settings={"weights": "right.pth"}).outcomes == {}


def test_shards_that_overwrite_leave_each_other_alone(tmp_path):
    write(tmp_path, Outcome("old", "old.mp4")).close()
    write(tmp_path, settings={"clip_length": 7}, part="-1-of-2", overwrite=True).close()
    first = write(tmp_path, DONE, part="-1-of-2", overwrite=True)
    second = write(tmp_path, part="-2-of-2", overwrite=True)
    assert second.outcomes == {}
    first.add(Outcome("b", "b.mp4"))
    first.close(), second.close()
    assert set(write(tmp_path, part="-1-of-2").outcomes) == {"a", "b"}


def test_another_division_of_the_work_waits(tmp_path):
    """Two processes for one video would mix their files."""
    first = write(tmp_path, DONE, part="-1-of-2")
    for part, settings in (("", {"clip_length": 5}), ("-1-of-3", {"clip_length": 5}), ("-2-of-2", {"clip_length": 7})):
        with pytest.raises(OutputError, match=r"manifest-1-of-2.jsonl: another pyvseg batch, with other (shards|settings)"):
            write(tmp_path, settings=settings, part=part, overwrite=True)
    first.add(FAILED)
    assert len(notes(tmp_path)) == 2


def test_without_locks(tmp_path, monkeypatch):
    """Some network file systems have none."""

    def refuse(*given):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    write(tmp_path, DONE).close()
    assert write(tmp_path).outcomes == {"a": DONE}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk(tmp_path):
    manifest = write(tmp_path)
    manifest._file.close()
    manifest._file = open("/dev/full", "ab")
    with pytest.raises(OutputError, match="manifest.jsonl: No space left"):
        manifest.add(DONE)
    manifest.close()


def damaged_manifests():
    """What a crash of the file system may leave of a whole manifest, and how many videos then run again."""
    yield "torn end", lambda lines: b"\n".join(lines)[:-30], 1
    yield "zeros inside", lambda lines: b"\n".join([*lines[:2], b"\0" * 90, *lines[3:]]) + b"\n", 1
    yield "nonsense inside", lambda lines: b"\n".join([*lines[:3], b'{"status": 3}', b"[1]", *lines[5:]]) + b"\n", 2
    yield "only a torn first line", lambda lines: lines[0][:20], 6
    yield "empty", lambda lines: b"", 6


@pytest.mark.parametrize("damage, again", [pytest.param(*rest, id=name) for name, *rest in damaged_manifests()])
def test_damaged_manifest(clips, tmp_path, undisturbed, damage, again):
    go(clips, tmp_path / "out")
    path = tmp_path / "out" / "manifest.jsonl"
    path.write_bytes(damage(path.read_bytes().splitlines()))
    report = go(clips, tmp_path / "out")
    assert report.done == again and files(tmp_path / "out") == undisturbed
    assert go(clips, tmp_path / "out").before == 6


def test_manifest_without_its_first_line(clips, tmp_path):
    go(clips, tmp_path / "out")
    path = tmp_path / "out" / "manifest.jsonl"
    path.write_bytes(b"\0" * 40 + path.read_bytes()[40:])
    with pytest.raises(OutputError, match="first line is damaged.*--overwrite"):
        go(clips, tmp_path / "out")


def test_two_batches_for_one_folder(clips, tmp_path, begin):
    kill = begin(clips, tmp_path / "out", 1, 5)
    try:
        while not (tmp_path / "out" / "manifest.jsonl").exists() or not (tmp_path / "out" / "manifest.jsonl").read_text():
            time.sleep(0.02)
        with pytest.raises(OutputError, match="another pyvseg batch is writing there.*--shard"):
            go(clips, tmp_path / "out")
    finally:
        kill()


def test_shards(clips, tmp_path, undisturbed):
    for i in (2, 1, 3):
        report = go(clips, tmp_path / "out", shard=(i, 3))
        assert (report.videos, report.done) == (2, 2)
    assert files(tmp_path / "out") == undisturbed and len(notes(tmp_path / "out")) == 6 + 2
    assert go(clips, tmp_path / "out").before == 6
