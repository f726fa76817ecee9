# SPDX-License-Identifier: Apache-2.0
"""Video instance segmentation end to end, with small networks of random weights: mechanics, no accuracy."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor

import av
import cv2
import numpy as np
import pytest

from pyvseg.cli.main import main
from pyvseg.engine.instances import InstanceSegmentation, advance, segment
from pyvseg.engine.types import Frame
from pyvseg.errors import VideoError
from pyvseg.models import spool, zoo
from pyvseg.models.categories import OVIS, YOUTUBE_VIS_2019, YOUTUBE_VIS_2021
from pyvseg.video import writer
from pyvseg.video.rle import decode_rle
from tests.video.clips import images

NAMES = ["mask2former_video_r50_ytvis19", "minvis_r50_ytvis21", "ctvis_r50_ovis", "vita_r50_ytvis19", "genvis_r50_ytvis19_semionline"]


@pytest.mark.parametrize("name", NAMES)
def test_run_writes_results_masks_and_overlay(name, small, clip, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["run", str(clip), "--model", name, "--weights", str(small(name)), "--out", str(out), "--score-threshold", "0", "--top-k", "7"]
    assert main(command) == 0, capsys.readouterr().err
    assert "results.json, 7 tracks" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert [r["score"] for r in results] == sorted((r["score"] for r in results), reverse=True) and len(results) == 7
    for result in results:
        assert result["video_id"] == "street" and 1 <= result["category_id"] <= len(zoo.variant(name).classes)
        assert len(result["segmentations"]) == 5
        for rle in result["segmentations"]:
            assert rle is None or decode_rle(rle, (54, 71), "result").any()
    labels = [cv2.imread(str(out / "masks" / f"{t:05d}.png"), cv2.IMREAD_UNCHANGED) for t in range(5)]
    assert all(image.shape[:2] == (54, 71) for image in labels)
    with av.open(str(out / "overlay.mp4")) as movie:
        assert not movie.streams.audio and sum(1 for _ in movie.decode(video=0)) == 5
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "masks", "overlay.mp4", "results.json"]
    assert main(command) == 2 and "--overwrite" in capsys.readouterr().err


def test_clear_errors(small, clip, tmp_path, capsys):
    name = "ctvis_r50_ovis"
    weights = str(small(name))
    run = ["run", str(clip), "--out", str(tmp_path / "out"), "--model"]
    assert main([*run, name, "--weights", weights, "--mask", "first.png"]) == 2 and "leave --mask out" in capsys.readouterr().err
    assert main([*run, name]) == 2 and "download" in capsys.readouterr().err
    assert main([*run, "minvis_r50_ytvis19", "--weights", weights]) == 2 and "fit ctvis_r50_ovis" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_one_frame_of_any_shape(name, small):
    model = zoo.load(name, weights=small(name))
    for height, width in ((1, 1), (3, 400), (300, 2)):
        tracks = segment(model, [Frame(0, np.zeros((height, width, 3), np.uint8), "0")])
        assert tracks[0].masks.shape == (1, height, width) and np.isfinite(tracks.scores).all()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_gives_nearly_the_same(name, small):
    weights, frames = small(name), [Frame(t, image, str(t)) for t, image in enumerate(images(4))]
    exact, near = (segment(zoo.load(name, weights=weights, precision=precision), frames) for precision in ("float32", "bfloat16"))
    assert len(near) == len(exact) and np.allclose(near.scores, exact.scores, atol=0.03) and near[0].masks.shape == (4, 48, 64)


@pytest.mark.parametrize("name", NAMES[1:3])
def test_linked_in_a_thread_as_on_a_gpu(name, small, monkeypatch):
    """In between two steps `state` is complete after `settle`; what goes wrong there is told by the next step."""
    model, frames = zoo.load(name, weights=small(name)), [Frame(t, image, str(t)) for t, image in enumerate(images(10))]
    segmentation = InstanceSegmentation(model)
    segmentation._linker = ThreadPoolExecutor(1)
    for t, frame in enumerate(frames):
        segmentation.step(frame)
        if t == 7:
            segmentation.settle()
            assert len(segmentation.state.masks) == 8
    advance([segmentation])
    found, expected = segmentation.finish(), segment(model, frames)
    assert np.array_equal(found.scores, expected.scores) and [track.rle for track in found] == [track.rle for track in expected]
    monkeypatch.setattr(model, "link", lambda clip, state: 1 / 0)
    segmentation.add(frames[0])
    advance([segmentation])
    with pytest.raises(ZeroDivisionError):
        segmentation.settle()


def test_damaged_weights_and_full_disks(small, clip, tmp_path, capsys, monkeypatch):
    """One line each, and nothing is left."""
    name = "minvis_r50_ytvis21"
    weights = small(name)
    run = ["run", str(clip), "--model", name, "--out", str(tmp_path / "out"), "--weights"]
    for keep in (20, weights.stat().st_size // 2):
        part = tmp_path / "part.safetensors"
        part.write_bytes(weights.read_bytes()[:keep])
        assert main([*run, str(part)]) == 2 and "damaged" in capsys.readouterr().err

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for place, what, message in ((spool.SpooledTemporaryFile, "write", "temporary folder"), (writer, "write_labels", "cannot write")):
        with monkeypatch.context() as patched:
            patched.setattr(place, what, full)
            assert main([*run, str(weights)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and message in lines[0] and "No space left" in lines[0]
        assert not (tmp_path / "out").exists()


def test_frames_of_another_size_and_no_frames(small):
    model = zoo.load("minvis_r50_ytvis21", weights=small("minvis_r50_ytvis21"))
    frames = [Frame(t, np.zeros((20 + t, 30, 3), np.uint8), str(t)) for t in range(2)]
    with pytest.raises(VideoError, match="from 30x20 to 30x21"):
        segment(model, frames)
    with pytest.raises(VideoError, match="no frames"):
        segment(model, [])


def test_bfloat16_stays_near_float32(small, clip):
    path = small("ctvis_r50_ovis")
    frames = [Frame(t, cv2.imread(str(p)), str(t)) for t, p in enumerate(sorted(clip.iterdir()))]
    exact, narrow = (segment(zoo.load("ctvis_r50_ovis", weights=path, precision=p), frames) for p in ("float32", "bfloat16"))
    assert abs(exact.scores[0] - narrow.scores[0]) < 0.1 * exact.scores[0] and narrow.scores.dtype == np.float32


def test_class_names():
    assert [len(names) for names in (YOUTUBE_VIS_2019, YOUTUBE_VIS_2021, OVIS)] == [40, 40, 25]
    assert (YOUTUBE_VIS_2019[27], YOUTUBE_VIS_2021[13], OVIS[21]) == ("airplane", "flying_disc", "motorcycle")
    for v in zoo.ZOO.values():  # detectors number their classes from 1
        assert not v.classes or len(v.classes) == v.settings.classes - (v.task == "video object detection")
