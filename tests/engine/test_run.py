# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from pyvseg.engine.output import Interrupted
from pyvseg.engine.recipe import Results
from pyvseg.engine.run import run
from pyvseg.engine.tasks.following import Following
from pyvseg.errors import OutputError, PyvsegError, VideoError
from pyvseg.video import open_video, png, read_labels, write_labels
from tests.conftest import ROOT
from tests.engine.standin import standin
from tests.video.clips import images, square, write_images, write_video

WITHOUT_OVERLAY = standin(results=Results(overlay=False))


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "clip.mp4", images(23))


def follow(video, out, masks=None, task=None, **options):
    return run(task or standin(), video, {0: square()} if masks is None else masks, out=out, progress=False, **options)


def labels(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: read_labels(path) for path in sorted(folder.glob("*.png"))}


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_one_video(tmp_path, video):
    summary = follow(video, tmp_path / "out")
    masks = labels(tmp_path / "out" / "masks")
    assert list(masks) == [f"{t:05d}" for t in range(23)]
    assert all(np.array_equal(masks[f"{t:05d}"], np.roll(square(), (t + 4) // 5, 1)) for t in range(23))
    assert (summary.frames, summary.written[1]) == (23, ("palette PNGs", str(tmp_path / "out" / "masks"))) and summary.fps > 0
    (entry,) = json.loads((tmp_path / "out" / "masks.json").read_text())
    assert entry["video_id"] == "clip" and len(entry["segmentations"]) == 23
    with av.open(str(tmp_path / "out" / "overlay.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 23
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "masks", "masks.json", "overlay.mp4"]


def test_folder_and_arrays_give_the_same_masks(tmp_path):
    frames = images(12)
    for name, source in (("a", write_images(tmp_path / "clip", frames)), ("b", frames), ("c", iter(frames))):
        follow(source, tmp_path / name, task=WITHOUT_OVERLAY)
    a, b, c = (labels(tmp_path / name / "masks") for name in "abc")
    assert len(a) == 12 and all(np.array_equal(a[k], b[k]) and np.array_equal(a[k], c[k]) for k in a)
    assert not (tmp_path / "a" / "overlay.mp4").exists()


def test_objects_that_enter_late(tmp_path, video):
    follow(video, tmp_path / "out", {3: square(1), 8: np.flipud(square(4))})
    masks = labels(tmp_path / "out" / "masks")
    present = [set(np.unique(m)) - {0} for m in masks.values()]
    assert present == [set()] * 3 + [{1}] * 5 + [{1, 4}] * 15
    one, four = json.loads((tmp_path / "out" / "masks.json").read_text())
    assert [one["segmentations"][t] is None for t in (2, 3)] == [True, False]
    assert len(four["segmentations"]) == 23 and four["segmentations"][7] is None and four["segmentations"][8]


def test_part_of_a_video(tmp_path, video):
    follow(video, tmp_path / "out", {8: square()}, frames=(8, 12))
    assert list(labels(tmp_path / "out" / "masks")) == ["00008", "00009", "00010", "00011"]
    with pytest.raises(VideoError, match="no mask inside frames 9:12"):
        follow(video, tmp_path / "none", {8: square()}, frames=(9, 12))


def dataset(root: Path, masks: dict[str, list[int]], frames: int = 6) -> Path:
    """Sequences with masks at the given frames; object t + 1 stands in the mask of frame t."""
    for name, indices in masks.items():
        write_images(root / "JPEGImages" / "480p" / name, images(frames))
        (root / "Annotations" / "480p" / name).mkdir(parents=True)
        for t in indices:
            write_labels(root / "Annotations" / "480p" / name / f"{t:05d}.png", square(t + 1))
    return root


def test_dataset_chooses_masks(tmp_path):
    """All frames annotated (DAVIS train and val): the later masks are the answer and must not be used."""
    root = dataset(tmp_path / "data", {"all": range(6), "first": [0], "late": [0, 2]})
    summary = run(standin(), root, out=tmp_path / "out", progress=False)
    assert "first mask only for 1, every given mask for 2" in summary.note
    used = {name: {int(i) for m in labels(tmp_path / "out" / "Annotations" / name).values() for i in np.unique(m)} for name in ("all", "first", "late")}
    assert used == {"all": {0, 1}, "first": {0, 1}, "late": {0, 1, 3}}
    assert files(tmp_path / "out" / "overlays") == ["all.mp4", "first.mp4", "late.mp4"]
    assert files(tmp_path / "out" / "rle") == ["all.json", "first.json", "late.json"]
    run(WITHOUT_OVERLAY, root, out=tmp_path / "forced", annotations="first", sequences=["late"], progress=False)
    assert {int(i) for m in labels(tmp_path / "forced" / "Annotations" / "late").values() for i in np.unique(m)} == {0, 1}


def test_youtube_vos_keeps_required_frames(tmp_path):
    root = dataset(tmp_path / "data", {"v": [1, 3]})
    meta = {"videos": {"v": {"objects": {"2": {"frames": ["00001", "00003", "00005"]}, "4": {"frames": ["00003", "00005"]}}}}}
    (root / "meta.json").write_text(json.dumps(meta))
    run(standin(), root, out=tmp_path / "out", progress=False)
    assert list(labels(tmp_path / "out" / "Annotations" / "v")) == ["00001", "00003", "00005"]


def test_sequence_lists(tmp_path):
    root = dataset(tmp_path / "data", {"a": [0], "b": [0], "c": [0]}, frames=2)
    (tmp_path / "val.txt").write_text("a\nc\n")
    run(WITHOUT_OVERLAY, root, out=tmp_path / "out", sequences=[str(tmp_path / "val.txt")], progress=False)
    assert sorted(p.name for p in (tmp_path / "out" / "Annotations").iterdir()) == ["a", "c"]
    with pytest.raises(PyvsegError, match="no sequence d; there are a, b, c"):
        run(standin(), root, out=tmp_path / "x", sequences=["d"], progress=False)


def test_dataset_without_masks(tmp_path):
    root = dataset(tmp_path / "data", {"a": [0], "b": []}, frames=2)
    with pytest.raises(PyvsegError, match="'b'"):
        run(standin(), root, out=tmp_path / "out", progress=False)
    with pytest.raises(PyvsegError, match="leave --mask out"):
        run(standin(), root, {0: square()}, out=tmp_path / "out", progress=False)
    with pytest.raises(PyvsegError, match="holds several videos"):
        run(standin(), dataset(tmp_path / "whole", {"a": [0]}, frames=2), out=tmp_path / "out", frames=(0, 1), progress=False)
    assert not (tmp_path / "out").exists()


def truncated(tmp_path):
    path = write_video(tmp_path / "cut.mkv", images(60))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path, {0: square()}


def bad_inputs():
    yield "truncated", truncated, VideoError, "cut short"
    yield "unreadable", lambda p: ((p / "a.mp4").write_bytes(b"x" * 999) and p / "a.mp4", {0: square()}), VideoError, "cannot be read"
    yield "no frames", lambda p: ((p / "empty").mkdir() or p / "empty", {0: square()}), VideoError, "no images"
    yield "changing size", lambda p: (images(8) + images(3, 64, 80), {0: square()}), VideoError, "frame 00008 is 80x64"
    yield "mask of another size", lambda p: (images(3), {0: square(1, 24, 32)}), VideoError, "32x24"
    yield "empty mask", lambda p: (images(3), {0: square(0)}), VideoError, "empty"
    yield "too many objects", lambda p: (images(3), np.arange(48 * 64).reshape(48, 64)), VideoError, "at most 254"
    yield "no masks", lambda p: (images(3), {}), VideoError, "no masks given"
    yield "mask behind the end", lambda p: (write_video(p / "a.mp4", images(3)), {0: square(), 9: square()}), VideoError, "no such frame"
    yield "mask behind the end, found late", lambda p: (iter(images(3)), {0: square(), 9: square()}), VideoError, "frame 9 but only 3"


@pytest.mark.parametrize("make, error, message", [pytest.param(*rest, id=name) for name, *rest in bad_inputs()])
def test_bad_input_leaves_nothing(tmp_path, make, error, message):
    source, masks = make(tmp_path)
    with pytest.raises(error, match=message) as caught:
        follow(source, tmp_path / "out", masks)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("pyvseg")]


def test_labels_missing(tmp_path, video):
    with pytest.raises(VideoError, match="labels are missing.*--mask"):
        run(standin(), video, None, out=tmp_path / "out")


def test_failing_model_leaves_nothing(tmp_path, video):
    class Broken:
        def step(self, frame):
            if frame.index == 9:
                raise RuntimeError("out of memory")
            return []

    with pytest.raises(RuntimeError, match="out of memory"):
        follow(video, tmp_path / "out", task=Following(lambda saved: Broken(), {}))
    assert not (tmp_path / "out").exists()


def test_existing_folder(tmp_path, video):
    out = tmp_path / "out"
    out.mkdir()
    follow(video, out)  # an empty folder is fine
    before = files(out)
    with pytest.raises(OutputError, match="already holds results.*--overwrite"):
        follow(video, out)
    assert files(out) == before
    (out / "mine.txt").write_text("keep")
    (out / "masks" / "99999.png").write_text("of an older run")
    follow(video, out, overwrite=True)
    assert files(out) == sorted([*before, "mine.txt"])
    with pytest.raises(OutputError, match="is a file"):
        follow(video, out / "mine.txt")


def test_failed_overwrite_keeps_the_old_results(tmp_path, video):
    follow(video, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(VideoError):
        follow(images(8) + images(3, 64, 80), tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == before


def test_unwritable_output(tmp_path, video):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write .*file"):
        follow(video, tmp_path / "file" / "out")


def test_full_disk_says_what_remains(tmp_path, video, monkeypatch):
    whole = png.encode_labels

    def fill(labels, palette):
        if len(list(tmp_path.rglob("*.png"))) == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(labels, palette)

    follow(video, tmp_path / "undisturbed")
    expected = labels(tmp_path / "undisturbed" / "masks")
    (tmp_path / "undisturbed").rename(tmp_path.parent / f"{tmp_path.name}-undisturbed")
    monkeypatch.setattr(png, "encode_labels", fill)
    with pytest.raises(OutputError, match=r"No space left on device.*12 complete masks remain in .*--resume"):
        follow(video, tmp_path / "out")
    kept = labels(tmp_path / "out" / "unfinished" / "masks")
    assert len(kept) == 12 and all(np.array_equal(kept[k], expected[k]) for k in kept)
    assert not [f for f in files(tmp_path / "out") if f.endswith((".mp4", ".part"))]
    monkeypatch.setattr(png, "encode_labels", whole)
    with pytest.raises(OutputError, match="unfinished run.*--resume"):
        follow(video, tmp_path / "out")
    follow(video, tmp_path / "out", resume=True)
    resumed = labels(tmp_path / "out" / "masks")
    assert list(resumed) == list(expected) and all(np.array_equal(resumed[k], expected[k]) for k in expected)


@pytest.mark.skipif(sys.platform != "linux", reason="needs file size limits as Linux has them")
def test_full_disk_for_the_video(tmp_path, video):
    """A limit on file sizes stops the overlay, the largest file; the run must end with one line, not with a crash."""
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
from pyvseg.engine.run import run
from pyvseg.errors import OutputError
from tests.engine.standin import standin
from tests.video.clips import square
try:
    run(standin(), {str(video)!r}, {{0: square()}}, out={str(tmp_path / "out")!r}, progress=False)
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "cannot write" in done.stdout and "File too large" in done.stdout, done.stderr
    assert not [f for f in files(tmp_path / "out") if f.endswith((".mp4", ".part"))]


def interrupt_at(index: int, task):
    """The task, with Ctrl-C pressed when it is given frame `index`."""

    def propagation(saved):
        inner = task.propagation(saved)
        step = inner.step

        def stepping(frame):
            if frame.index == index:
                signal.raise_signal(signal.SIGINT)
            return step(frame)

        inner.step = stepping
        return inner

    return replace(task, propagation=propagation)


@pytest.mark.parametrize("at", [(1,), (8,), (8, 17), (8, 12, 15)])
def test_interrupted_and_resumed_equals_undisturbed(tmp_path, video, at):
    masks = {0: square(), 12: np.flipud(square(4))}
    follow(video, tmp_path / "whole", masks)
    for n, index in enumerate(at):
        with pytest.raises(Interrupted, match="stopped in .* after .* --resume"):
            follow(video, tmp_path / "out", masks, interrupt_at(index, standin()), resume=n > 0)
        unfinished = tmp_path / "out" / "unfinished"
        left = labels(unfinished / "masks")
        assert max(index - 5, 0) < len(left) < 23 and not (tmp_path / "out" / "masks").exists()
        assert [p.name for p in unfinished.glob("*") if p.suffix == ".mp4"] == []
    counts = []
    task = standin()
    counted = replace(task, propagation=lambda saved: counts.append(saved) or task.propagation(saved))
    summary = follow(video, tmp_path / "out", masks, counted, resume=True)
    assert counts[0] is not None and summary.frames == 23 - len(left)  # went on from the saved state
    a, b = labels(tmp_path / "whole" / "masks"), labels(tmp_path / "out" / "masks")
    assert list(a) == list(b) and all(np.array_equal(a[k], b[k]) for k in a)
    assert (tmp_path / "whole" / "masks.json").read_bytes() == (tmp_path / "out" / "masks.json").read_bytes()
    for first, second in zip(*(open_video(tmp_path / name / "overlay.mp4") for name in ("whole", "out")), strict=True):
        assert np.abs(first.image.astype(int) - second.image).mean() < 2  # x264's threads make it vary a little
    assert files(tmp_path / "whole") == files(tmp_path / "out")


def test_interrupted_while_finished_frames_pass_by(tmp_path, video, monkeypatch):
    """A resumed run reads again what it has written; Ctrl-C there changes nothing."""
    follow(video, tmp_path / "whole")
    with pytest.raises(Interrupted):
        follow(video, tmp_path / "out", task=interrupt_at(17, standin()))
    again = Following.lane

    def interrupting(*given):
        lane = again(*given)
        whole = lane.again
        lane.again = lambda frame: whole(frame) if frame.index != 3 else lane.session.stop.set()
        return lane

    monkeypatch.setattr(Following, "lane", interrupting)
    with pytest.raises(Interrupted, match="between two videos"):
        follow(video, tmp_path / "out", resume=True)
    monkeypatch.setattr(Following, "lane", again)
    assert 0 < follow(video, tmp_path / "out", resume=True).frames < 10
    a, b = labels(tmp_path / "whole" / "masks"), labels(tmp_path / "out" / "masks")
    assert list(a) == list(b) and all(np.array_equal(a[k], b[k]) for k in a)


def test_resume_refuses_other_settings(tmp_path, video):
    with pytest.raises(Interrupted):
        follow(video, tmp_path / "out", task=interrupt_at(8, standin()))
    before = files(tmp_path / "out")
    with pytest.raises(OutputError, match="clip_length was 5 and is now 7"):
        follow(video, tmp_path / "out", task=standin(7), resume=True)
    assert files(tmp_path / "out") == before


def test_resume_of_a_killed_run_starts_again(tmp_path, video):
    """Whatever kills a run leaves no state to trust; the PNGs are then computed anew."""
    work = tmp_path / "out" / "unfinished"
    (work / "masks").mkdir(parents=True)
    (work / "run.json").write_text("{")
    follow(video, tmp_path / "out", resume=True)
    assert len(labels(tmp_path / "out" / "masks")) == 23


def test_resume_of_a_dataset_skips_what_is_finished(tmp_path):
    root = dataset(tmp_path / "data", {"a": [0], "b": [0]}, frames=12)
    calls = []
    task = interrupt_at(6, standin())

    def second_only(saved):
        calls.append(saved)
        return (standin() if len(calls) == 1 else task).propagation(saved)

    with pytest.raises(Interrupted):
        run(replace(task, propagation=second_only), root, out=tmp_path / "out", progress=False)
    assert [p.name for p in (tmp_path / "out" / "Annotations").iterdir()] == ["a"]
    summary = run(standin(), root, out=tmp_path / "out", resume=True, progress=False)
    assert summary.frames < 12 and len(labels(tmp_path / "out" / "Annotations" / "b")) == 12
    assert not (tmp_path / "out" / "unfinished").exists()


def test_resume_after_an_interrupted_overwrite_mixes_nothing(tmp_path):
    """Results that older settings left are not taken for finished ones."""
    root = dataset(tmp_path / "data", {"a": [0], "b": [0]}, frames=12)
    run(standin(5), root, out=tmp_path / "out", progress=False)
    with pytest.raises(Interrupted):
        run(interrupt_at(6, standin(2)), root, out=tmp_path / "out", overwrite=True, progress=False)
    run(standin(2), root, out=tmp_path / "out", resume=True, progress=False)
    run(standin(2), root, out=tmp_path / "new", progress=False)
    for name in ("a", "b"):
        mixed, new = (labels(tmp_path / out / "Annotations" / name) for out in ("out", "new"))
        assert all(np.array_equal(mixed[k], new[k]) for k in new)
    assert run(standin(2), root, out=tmp_path / "out", resume=True, progress=False).frames == 0


def test_overwrite_and_resume_exclude_each_other(tmp_path, video):
    with pytest.raises(PyvsegError, match="exclude"):
        follow(video, tmp_path / "out", overwrite=True, resume=True)
