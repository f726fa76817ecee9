# SPDX-License-Identifier: Apache-2.0
"""Runs with a panoptic model: files in the layouts of VIPSeg and KITTI-STEP, bad input, interrupted and resumed runs."""

import json
import signal
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from pyvseg.api import PanopticModel
from pyvseg.datasets.coco_panoptic import PanopticVideos
from pyvseg.engine import memory
from pyvseg.engine.output import Interrupted
from pyvseg.engine.panoptic import PanopticSegmentation
from pyvseg.engine.recipe import Results
from pyvseg.engine.run import run
from pyvseg.engine.tasks.panoptic import Panoptic
from pyvseg.errors import PyvsegError, VideoError
from pyvseg.layers.inference import for_inference
from pyvseg.video.panoptic import read_ids, read_step
from pyvseg.video.reader import open_video
from tests.models.test_video_kmax import video_model
from tests.video.clips import images, write_images, write_video

NAMES = ("cat", "dog", "bird", "sky", "road", "wall")


@pytest.fixture(scope="module")
def model():
    return Panoptic(for_inference(video_model(2), torch.float32), "small", NAMES, {"weights": "random"})


@pytest.fixture
def clips(tmp_path):
    for name, count in (("a", 5), ("b", 4)):
        write_images(tmp_path / "clips" / name, images(count))
    return tmp_path / "clips"


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "manifest.json"}


def test_a_folder_of_videos_in_vipsegs_layout(tmp_path, clips, model):
    summary = run(replace(model, results=Results(step_pngs=True)), clips, out=tmp_path / "out", progress=False)
    assert summary.frames == 9 and summary.videos == 2
    found = PanopticVideos(tmp_path / "out" / "pred.json", tmp_path / "out" / "pan_pred")
    assert found.videos() == ["a", "b"] and [found.categories[i].name for i in range(6)] == list(NAMES)
    for video in found.videos():
        for stem in found.segments(video):
            values = read_ids(tmp_path / "out" / "pan_pred" / video / f"{stem}.png")
            classes, instances = read_step(tmp_path / "out" / "step" / video / f"{stem}.png")
            assert np.array_equal(classes == 255, values == 0)
            assert np.array_equal(classes[values > 0], values[values > 0] // 10000)
            is_thing = (classes < 3) & (values > 0)
            assert np.array_equal(instances, np.where(is_thing, values % 10000, 0))
    entry = json.loads((tmp_path / "out" / "pred.json").read_text())["annotations"][0]["annotations"][0]
    assert entry["segments_info"] and all(s["category_id"] == s["id"] // 10000 for s in entry["segments_info"])
    assert open_video(tmp_path / "out" / "overlays" / "a.mp4").frame_count == 5
    assert not (tmp_path / "out" / "unfinished").exists()


def test_interrupted_and_resumed_equals_undisturbed(tmp_path, model, monkeypatch):
    write_video(tmp_path / "clip.mp4", images(9))
    run(model, tmp_path / "clip.mp4", out=tmp_path / "whole", progress=False)
    real, calls = PanopticSegmentation.step, []

    def step(self, frames, **last):
        calls.append(frames)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(self, frames, **last)

    monkeypatch.setattr(PanopticSegmentation, "step", step)
    with pytest.raises(Interrupted, match="--resume goes on"):
        run(model, tmp_path / "clip.mp4", out=tmp_path / "parts", progress=False)
    monkeypatch.setattr(PanopticSegmentation, "step", real)
    summary = run(model, tmp_path / "clip.mp4", out=tmp_path / "parts", resume=True, progress=False)
    assert summary.frames == 5
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(whole[name] == parts[name] for name in whole if not name.endswith(".mp4"))
    assert open_video(tmp_path / "parts" / "overlay.mp4").frame_count == 9
    assert run(model, tmp_path / "clip.mp4", out=tmp_path / "parts", resume=True, progress=False).frames == 0


def test_bad_input(tmp_path, model):
    write_images(tmp_path / "clip", images(3))
    short = Panoptic(model.network, "small", NAMES[:4])
    with pytest.raises(PyvsegError, match="small: 4 class names for a model of 6 classes"):
        run(short, tmp_path / "clip", out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    state = PanopticSegmentation(model.network)
    frames = list(open_video(tmp_path / "clip"))
    state.step(frames[:2])
    frames[2].image = frames[2].image[:20]
    with pytest.raises(VideoError, match="size changes from"):
        state.step(frames[2:])


def test_clips_that_do_not_fit_are_shortened(tmp_path, clips, model, monkeypatch, capsys):
    def segmented(length, out):
        network = copy(model.network)
        network.settings = replace(network.settings, clip_length=length)
        run(replace(model, network=network), clips / "a", out=tmp_path / out, overwrite=True)
        return files(tmp_path / out)

    expected = segmented(2, "two")
    video = open_video(clips / "a")
    monkeypatch.setattr(memory, "total", lambda device: memory.panoptic_bytes(model.network, video, 2) / 0.8 + 1)
    capsys.readouterr()
    assert segmented(4, "four") == expected
    assert "a: clip length 2 in place of 4, which would not fit into memory" in capsys.readouterr().err
    monkeypatch.setattr(memory, "total", lambda device: 1000)
    with pytest.raises(VideoError, match="a: frames of 64x48 take small .* GB of memory .* can be had"):
        segmented(4, "none")


def test_results_in_python(tmp_path, model):
    whole = PanopticModel(model.network, NAMES)
    results = list(whole.segment(images(5)))
    assert [r.index for r in results] == list(range(5)) and results[0].values.shape == (48, 64)
    stream, streamed = whole.stream(), []
    for frame in open_video(images(5)):
        streamed += stream.step([frame])
    assert len(streamed) == 4 and len(stream.step([], last=True)) == 1
    with pytest.raises(VideoError, match="no frames"):
        list(whole.segment(iter(())))
