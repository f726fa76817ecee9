# SPDX-License-Identifier: Apache-2.0
"""Tube-Link from files to files: panoptic maps, VSPW's labels, tracks; interrupted, resumed, streamed."""

import json
import signal
from dataclasses import replace

import cv2
import numpy as np
import pytest

import pyvseg
from pyvseg.cli.main import main
from pyvseg.engine.instances import InstanceSegmentation
from pyvseg.engine.memory import needed
from pyvseg.engine.output import Interrupted
from pyvseg.engine.recipe import Recipe, Results
from pyvseg.engine.run import run
from pyvseg.errors import PyvsegError
from pyvseg.models import zoo
from pyvseg.video.panoptic import read_ids
from pyvseg.video.png import read_labels
from pyvseg.video.reader import open_video
from tests.video.clips import images, write_images, write_video


def test_panoptic_run_writes_what_segment_gives(small, clip, tmp_path):
    name = "tube_link_r50_vipseg"
    weights = small(name)
    assert main(["run", str(clip), "--model", name, "--weights", str(weights), "--out", str(tmp_path / "out"), "--clip-length", "3"]) == 0
    model = pyvseg.load(name, weights=weights, device="cpu")
    model.network.settings = replace(model.network.settings, clip_length=3)
    results = list(model.segment(clip))
    assert [r.index for r in results] == list(range(5))
    for result in results:
        assert np.array_equal(read_ids(tmp_path / "out" / "pan_pred" / clip.name / f"{result.name}.png"), result.values)
    stream = model.stream()
    shown = [result for frame in open_video(clip) for result in stream.step([frame])] + stream.step([], last=True)
    assert all(np.array_equal(a.values, b.values) for a, b in zip(results, shown)) and len(shown) == 5
    assert not (tmp_path / "out" / "semantic").exists()
    recipe = Recipe(name, weights, "cpu", results=Results(compat=False))
    assert recipe.settings()["compat"] is False and recipe.task().network.settings.compat is False


def test_semantic_run_is_what_vspw_evaluates(small, tmp_path, capsys):
    data, rng = tmp_path / "VSPW", np.random.default_rng(0)
    for video, count in (("a", 5), ("b", 8)):
        write_images(data / "data" / video / "origin", images(count))
        for path in sorted((data / "data" / video / "origin").iterdir()):
            mask = data / "data" / video / "mask" / f"{path.stem}.png"
            mask.parent.mkdir(exist_ok=True)
            cv2.imwrite(str(mask), rng.integers(1, 125, cv2.imread(str(path)).shape[:2]).astype(np.uint8))
            cv2.imwrite(str(path.with_suffix(".jpg")), cv2.imread(str(path)))
            path.unlink()
    (data / "val.txt").write_text("a\nb\n")
    name, out = "tube_link_r50_vspw", tmp_path / "out"
    weights = small(name)
    assert main(["run", str(data / "data"), "--model", name, "--weights", str(weights), "--out", str(out), "--no-overlay"]) == 0
    model = pyvseg.load(name, weights=weights, device="cpu")
    for result in model.segment(data / "data" / "b" / "origin"):
        assert np.array_equal(read_labels(out / "semantic" / "b" / f"{result.name}.png"), result.values // 10000 + 1)
    assert main(["eval", str(out / "semantic"), "--gt", str(data), "--protocol", "vspw", "--json", str(tmp_path / "s.json")]) == 0
    assert set(json.loads((tmp_path / "s.json").read_text())["sequences"]) == {"a", "b"}


def test_tracks_of_an_interrupted_run_are_those_of_a_whole_one(small, tmp_path, monkeypatch):
    name = "tube_link_r50_ytvis19"
    task = Recipe(name, small(name), "cpu", results=Results(score_threshold=0, top_k=6)).task()
    write_video(tmp_path / "clip.mp4", images(13))
    run(task, tmp_path / "clip.mp4", out=tmp_path / "whole", progress=False)
    real, calls = InstanceSegmentation.take, []

    def take(self, features):
        calls.append(features)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        real(self, features)

    monkeypatch.setattr(InstanceSegmentation, "take", take)
    with pytest.raises(Interrupted, match="--resume goes on"):
        run(task, tmp_path / "clip.mp4", out=tmp_path / "parts", progress=False)
    monkeypatch.setattr(InstanceSegmentation, "take", real)
    run(task, tmp_path / "clip.mp4", out=tmp_path / "parts", resume=True, progress=False)
    whole, parts = ((tmp_path / each / "results.json").read_bytes() for each in ("whole", "parts"))
    assert whole == parts and len(json.loads(whole)) == 6
    assert all(len(track["segmentations"]) == 13 for track in json.loads(whole))
    with pytest.raises(PyvsegError, match="needs the whole video"):
        pyvseg.load(name, weights=task.settings["weights"], device="cpu").stream()


def test_memory_does_not_grow_with_the_video(small, tmp_path):
    name = "tube_link_r50_ytvis19"
    network = zoo.load(name, weights=small(name), device="cpu")
    for count in (10, 40):
        write_images(tmp_path / str(count), images(count))
    short, long = (needed(network, open_video(tmp_path / str(count)), 4) for count in (10, 40))
    assert short == long
