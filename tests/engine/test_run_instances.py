# SPDX-License-Identifier: Apache-2.0
"""Runs over several videos and data sets, interrupted and resumed ones: instance segmentation with small networks."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from pyvseg.engine import memory
from pyvseg.engine.instances import InstanceSegmentation, advance, segment
from pyvseg.engine.output import Interrupted
from pyvseg.engine.recipe import Results
from pyvseg.engine.run import run
from pyvseg.engine.tasks import instances as engine
from pyvseg.engine.tasks.instances import Instances
from pyvseg.engine.types import Frame
from pyvseg.errors import OutputError, PyvsegError, VideoError
from pyvseg.models import zoo
from pyvseg.models.categories import OVIS
from pyvseg.video.reader import open_video
from pyvseg.video.rle import decode_rle
from tests.video.clips import images, write_images, write_video

ONLINE = ["minvis_r50_ytvis21", "ctvis_r50_ovis", "genvis_r50_ytvis19_semionline", "vita_r50_ytvis19"]
LENGTHS = {"a": 7, "b": 3, "c": 11}


@pytest.fixture
def ready(small):
    def make(name):
        return Instances(zoo.load(name, weights=small(name)), name, zoo.variant(name).classes, {"weights": "small"})

    return make


@pytest.fixture
def clips(tmp_path) -> Path:
    for name, count in LENGTHS.items():
        write_video(tmp_path / "clips" / f"{name}.mp4", [image[::-1] for image in images(count)] if name == "b" else images(count))
    return tmp_path / "clips"


@pytest.fixture(autouse=True)
def _folders(tmp_path):
    (tmp_path / "clips").mkdir()


def go(task, source, out, *, at_once=2, resume=False, **wanted):
    task = replace(task, at_once=at_once, results=Results(score_threshold=0, top_k=6, **wanted))
    return run(task, source, out=out, resume=resume, progress=False)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_folder_of_videos(tmp_path, clips, ready):
    model = ready("ctvis_r50_ovis")
    summary = go(model, clips, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (summary.videos, summary.frames, summary.found["tracks"], len(results)) == (3, 21, 18, 18)
    for name, count in LENGTHS.items():
        entries = [r for r in results if r["video_id"] == name]
        assert len(entries) == 6 and all(len(r["segmentations"]) == count for r in entries)
        go(model, clips / f"{name}.mp4", tmp_path / name, at_once=1)
        alone = json.loads((tmp_path / name / "results.json").read_text())
        assert [r["category_id"] for r in alone] == [r["category_id"] for r in entries]
        np.testing.assert_allclose([r["score"] for r in alone], [r["score"] for r in entries], rtol=1e-4)
        assert len(list((tmp_path / "out" / "masks" / name).iterdir())) == count
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "masks", "overlays", "results.json", "tracks"]


def test_frames_of_several_videos_pass_the_encoder_together(ready):
    model = ready("minvis_r50_ytvis21").network
    videos = {name: images(5, *size) for name, size in {"a": (48, 64), "b": (48, 64), "c": (48, 100)}.items()}
    batches, encode = [], model.encode
    model.encode = lambda x: batches.append(len(x)) or encode(x)
    together = {name: InstanceSegmentation(model) for name in videos}
    for start in (0, 4):
        for name, frames in videos.items():
            for t in range(start, min(start + 4, 5)):
                together[name].add(Frame(t, frames[t], str(t)))
        advance(list(together.values()))
    assert batches == [8, 4, 2, 1]
    for name, frames in videos.items():
        alone, found = segment(model, [Frame(t, image, str(t)) for t, image in enumerate(frames)]), together[name].finish()
        np.testing.assert_allclose(alone.scores, found.scores, rtol=1e-4)


def youtube_vis(root: Path, categories) -> Path:
    """Two videos with ids as they please; the JSON lies in `annotations`, the images in a folder of the split's name."""
    videos = []
    for key, name in ((7, "cat"), (0, "dog")):
        write_images(root / "valid" / "JPEGImages" / name, images(4))
        videos.append({"id": key, "width": 64, "height": 48, "length": 3, "file_names": [f"{name}/{t:05d}.png" for t in (0, 1, 3)]})
    (root / "annotations").mkdir()
    path = root / "annotations" / "valid.json"
    path.write_text(json.dumps({"videos": videos, "categories": [{"id": i, "name": n} for i, n in categories], "annotations": None}))
    return path


def test_a_youtube_vis_split(tmp_path, ready):
    model = ready("ctvis_r50_ovis")
    path = youtube_vis(tmp_path / "data", [(3 * i + 2, name.capitalize()) for i, name in enumerate(OVIS)])
    go(model, path, tmp_path / "out", pngs=False, overlay=False)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [r["video_id"] for r in results] == [7] * 6 + [0] * 6
    assert all(r["category_id"] % 3 == 2 and len(r["segmentations"]) == 3 for r in results)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "results.json", "tracks"]
    go(model, tmp_path / "data", tmp_path / "from the folder", pngs=False, overlay=False)
    assert (tmp_path / "from the folder" / "results.json").read_bytes() == (tmp_path / "out" / "results.json").read_bytes()


def broken_data(root: Path):
    known = [(i + 1, name) for i, name in enumerate(OVIS)]
    path = youtube_vis(root, known)
    document = json.loads(path.read_text())

    def change(**entries):
        return lambda: path.write_text(json.dumps(document | entries))

    video = document["videos"][0]
    yield change(categories=[{"id": 1, "name": "unicorn"}]), "does not know 1 of its 1 categories (unicorn"
    yield change(videos=[]), "none at all"
    yield change(videos=[{**video, "file_names": ["../../etc/x.png"]}]), "lead out of"
    yield change(videos=[{**video, "file_names": ["no/00000.png"]}]), "no no/00000.png"
    yield change(videos=[{**video, "height": 50}]), "images are 64x48, the annotation file says 64x50"
    yield lambda: path.write_text("{"), "not a YouTube-VIS annotation file"
    yield lambda: (root / "annotations" / "train.json").write_text("{}"), "several JSON files"


def test_data_sets_that_do_not_fit(tmp_path, ready):
    model = ready("ctvis_r50_ovis")
    for damage, message in broken_data(tmp_path / "data"):
        damage()
        with pytest.raises(PyvsegError) as caught:
            go(model, tmp_path / "data", tmp_path / "out")
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def interrupt(monkeypatch, at: int) -> None:
    """Ctrl-C when so many batches have been segmented."""
    calls = []

    def advancing(videos, at_once):
        calls.append(videos)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        advance(videos, at_once)

    monkeypatch.setattr(engine, "advance", advancing)


@pytest.mark.parametrize("name", ONLINE)
def test_interrupted_and_resumed_equals_undisturbed(name, tmp_path, clips, ready, monkeypatch):
    model = ready(name)
    go(model, clips, tmp_path / "whole")
    for n, at in enumerate((1, 2)):  # with two videos under way, then with another pair
        interrupt(monkeypatch, at)
        with pytest.raises(Interrupted, match="stopped in .* --resume"):
            go(model, clips, tmp_path / "out", resume=n > 0)
        assert list((tmp_path / "out" / "unfinished").rglob("state-*.safetensors"))
        assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(engine, "advance", advance)
    summary = go(model, clips, tmp_path / "out", resume=True)
    assert 0 < summary.frames < 21
    whole, resumed = files(tmp_path / "whole"), files(tmp_path / "out")
    assert list(whole) == list(resumed)
    assert [k for k in whole if whole[k] != resumed[k] and not k.endswith(".mp4")] == []
    assert go(model, clips, tmp_path / "out", resume=True).frames == 0


def test_interrupted_while_drawing(tmp_path, clips, ready, monkeypatch):
    model, drawn = ready("minvis_r50_ytvis21"), engine._drawn

    def drawing(frame, *rest):
        if frame.index == 5:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # for the main thread to see it
        return drawn(frame, *rest)

    monkeypatch.setattr(engine, "_drawn", drawing)
    with pytest.raises(Interrupted, match="c after 11 frames"):
        go(model, clips / "c.mp4", tmp_path / "out")
    monkeypatch.setattr(engine, "_drawn", drawn)
    assert go(model, clips / "c.mp4", tmp_path / "out", resume=True).frames == 0
    go(model, clips / "c.mp4", tmp_path / "whole")
    assert (tmp_path / "whole" / "results.json").read_bytes() == (tmp_path / "out" / "results.json").read_bytes()


def test_resume_refuses_other_settings_and_damaged_states(tmp_path, clips, ready, monkeypatch):
    model = ready("minvis_r50_ytvis21")
    interrupt(monkeypatch, 1)
    with pytest.raises(Interrupted):
        go(model, clips / "c.mp4", tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(OutputError, match="score_threshold was 0 and is now 0.3"):
        run(model, clips / "c.mp4", out=tmp_path / "out", resume=True, progress=False)
    with pytest.raises(OutputError, match="unfinished run.*--resume"):
        go(model, clips / "c.mp4", tmp_path / "out")
    assert files(tmp_path / "out") == before
    (spool,) = (tmp_path / "out").rglob("state-*.0")
    spool.write_bytes(b"")
    with pytest.raises(PyvsegError, match="damaged"):
        go(model, clips / "c.mp4", tmp_path / "out", resume=True)


def test_a_bad_video_among_good_ones(tmp_path, clips, ready):
    """The finished remain, nothing else does."""
    (clips / "b.mp4").write_bytes(b"x" * 500)
    with pytest.raises(VideoError, match="b.mp4"):
        go(ready("minvis_r50_ytvis21"), clips, tmp_path / "out", at_once=1)
    assert sorted(p.name for p in (tmp_path / "out" / "tracks").iterdir()) == ["a.json"]
    assert not (tmp_path / "out" / "unfinished").exists() and not (tmp_path / "out" / "results.json").exists()


def test_each_object_once(ready, tmp_path, clips):
    go(ready("minvis_r50_ytvis21"), clips / "c.mp4", tmp_path / "out", compat=False)
    objects = [r["object_id"] for r in json.loads((tmp_path / "out" / "results.json").read_text())]
    assert len(objects) == len(set(objects)) == 6


def test_frames_that_can_be_read_once(ready, tmp_path):
    with pytest.raises(VideoError, match="second reading"):
        go(ready("minvis_r50_ytvis21"), iter(images(3)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert go(ready("minvis_r50_ytvis21"), iter(images(3)), tmp_path / "out", pngs=False, overlay=False).frames == 3


def test_colours_stay_with_their_objects(ready, tmp_path, clips):
    """An object's id is the same in every PNG: pixels of id i lie inside the masks of one track."""
    go(ready("genvis_r50_ytvis19_semionline"), clips / "c.mp4", tmp_path / "out", compat=False)
    tracks = json.loads((tmp_path / "out" / "results.json").read_text())
    for t in range(11):
        labels = cv2.imread(str(tmp_path / "out" / "masks" / f"{t:05d}.png"), cv2.IMREAD_UNCHANGED)
        labels = labels if labels.ndim == 2 else labels[..., 0] * 0 + labels.max(-1)
        for i, track in enumerate(tracks, 1):
            rle = track["segmentations"][t]
            inside = np.zeros((48, 64), bool) if rle is None else decode_rle(rle, (48, 64), "track")
            assert not ((labels == i) & ~inside).any()


def test_memory_that_will_not_do(tmp_path, ready, clips, monkeypatch):
    """Told before anything starts, with what to lower."""
    gib = 1 << 30
    monkeypatch.setattr(memory, "available", lambda device: gib)
    with pytest.raises(VideoError, match=r"7680x4320 frames take minvis_r50_ytvis21 about \d\.\d GB of memory \(cpu\), 1\.1 GB are free; try --precision bfl.*"):
        go(ready("minvis_r50_ytvis21"), [np.zeros((4320, 7680, 3), np.uint8)], tmp_path / "out")
    joint = ready("mask2former_video_r50_ytvis19")
    monkeypatch.setattr(memory, "available", lambda device: gib // 2)
    go(joint, clips / "a.mp4", tmp_path / "short")
    long = replace(open_video(clips / "a.mp4"), frame_count=10**6)
    with pytest.raises(VideoError, match="1000000 frames of 64x48, seen together, .* fewer --frames, or a model that goes frame by frame"):
        go(joint, long, tmp_path / "out", at_once=1)
    assert not (tmp_path / "out").exists()


def test_predicted_memory_follows_what_it_depends_on(ready):
    """Frames of 4K cost main memory only; the batch costs what the network's input is."""
    network = ready("minvis_r50_ytvis21").network
    videos = [open_video([np.zeros((*size, 3), np.uint8)]) for size in ((360, 640), (2160, 3840))]
    (small_device, small_main), (large_device, large_main) = (memory.needed(network, video, 4) for video in videos)
    assert small_device == large_device and 10 * small_main < large_main < 2**30
    assert memory.available(network.device) > 0
    assert [memory.queue_frames(open_video([np.zeros((*size, 3), np.uint8)]), 4) for size in ((360, 640), (4320, 7680))] == [8, 2]
