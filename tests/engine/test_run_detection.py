# SPDX-License-Identifier: Apache-2.0
"""Video object detection from files to files, with small networks behind the published names."""

import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pyvseg
from pyvseg import checkpoints
from pyvseg.cli.main import main
from pyvseg.engine.detection import DetectionStream, ObjectDetection, detect
from pyvseg.engine.recipe import Results
from pyvseg.engine.run import run
from pyvseg.engine.tasks import detection as engine
from pyvseg.engine.tasks.detection import Detection
from pyvseg.engine.types import Frame
from pyvseg.errors import PyvsegError, VideoError
from pyvseg.layers.backbones import ResNetSizes
from pyvseg.layers.pyramid import SwinPyramidSizes
from pyvseg.models import zoo
from pyvseg.models.frame_choice import references
from pyvseg.models.state import load_state, save_state
from pyvseg.models.video_detector import VideoDetector
from tests.video.clips import images, write_images, write_video

NAMES = ["transvod_single_r50_vid", "transvod_r50_vid", "transvodpp_swin_b_vid", "transvod_lite_swin_b_vid"]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Makes a variant small; returns its weights file."""

    def make(name):
        chosen = zoo.variant(name)
        pyramid = SwinPyramidSizes(8, (1, 1, 1, 1), (1, 2, 4, 8), 3, outputs=32)
        backbone = ResNetSizes(50, 8, 16, 8, dilated=True) if "r50" in name else pyramid
        sizes = dict(backbone=backbone, queries=84, hidden=32, ffn=32, heads=4, encoder_layers=1, decoder_layers=2, short_side=48)
        sizes |= {"clip_length": 4} if "lite" in name else {}
        chosen = replace(chosen, settings=replace(chosen.settings, **sizes))
        monkeypatch.setitem(zoo.ZOO, name, chosen)
        torch.manual_seed(0)
        path = tmp_path / f"{name}.safetensors"
        network = zoo.SYSTEMS[chosen.system].network(chosen.settings)
        for head in getattr(network, "class_heads", network.detector.class_embed):
            torch.nn.init.normal_(head.weight, std=1.0)  # sure of something
        checkpoints.write(path, network.state_dict())
        return path

    return make


@pytest.fixture
def ready(small):
    def make(name):
        return Detection(zoo.load(name, weights=small(name)), name, zoo.variant(name).classes, {"weights": "small"})

    return make


def frames(count, height=54, width=71):
    return [Frame(t, image, f"{t:05d}") for t, image in enumerate(images(count, height, width))]


@pytest.mark.parametrize("name", NAMES)
def test_a_video(name, small, tmp_path, capsys):
    write_video(tmp_path / "clip.mp4", images(6))
    weights = str(small(name))
    command = ["run", str(tmp_path / "clip.mp4"), "--model", name, "--weights", weights, "--out", str(tmp_path / "out"), "--score-threshold", "0"]
    assert main(command) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {entry["image_id"] for entry in found} == set(range(6)) and all(1 <= entry["category_id"] <= 30 for entry in found)
    assert f"{len(found)} boxes" in capsys.readouterr().out and (tmp_path / "out" / "overlay.mp4").stat().st_size
    model = pyvseg.load(name, weights=weights)
    video = model.detect(tmp_path / "clip.mp4")
    assert len(video) == 6 and sum(map(len, video)) == len(found)
    frame, entries = video[3], [entry for entry in found if entry["image_id"] == 3]
    assert [entry["category"] for entry in entries] == list(frame.categories)
    np.testing.assert_allclose([entry["score"] for entry in entries], frame.scores, rtol=1e-5)
    x, y, width, height = np.array([entry["bbox"] for entry in entries]).T
    np.testing.assert_allclose(np.stack([x, y, x + width, y + height], 1), frame.boxes, atol=2e-3)
    assert all(len(frame) <= 3 for frame in model.detect(tmp_path / "clip.mp4", top=3))


@pytest.mark.parametrize("name", NAMES)
def test_every_frame_passes_the_network_once(name, ready, monkeypatch):
    passed, detections = [], VideoDetector.detections
    monkeypatch.setattr(VideoDetector, "detections", lambda model, x: passed.append(len(x)) or detections(model, x))
    found = detect(ready(name).network, frames(21))
    assert sum(passed) == 21 and len(found) == 21


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name, small):
    weights, video = small(name), images(5)
    exact, near = (pyvseg.load(name, weights=weights, precision=precision).detect(video) for precision in ("float32", "bfloat16"))
    for a, b in zip(exact, near):
        assert abs(a.scores[:5] - b.scores[:5]).max() < 0.05
        assert a.boxes.dtype == b.boxes.dtype == np.float32


def test_results_do_not_depend_on_what_is_kept(ready):
    """Against the clip as published: the current frame and its references pass through the network together."""
    network = ready("transvodpp_swin_b_vid").network
    video = frames(5)
    found = detect(network, video)
    s, chosen = network.settings, [2, *references(2, 5, network.settings.references)]
    x = network.new_state(54, 71).size.input([video[t].image for t in chosen], s.mean, s.std)
    with torch.inference_mode():
        prediction = network(x)[-1]
        (expected,) = network.results(prediction, (54, 71))
    scores = expected.scores[expected.labels > 0]
    np.testing.assert_allclose(found[2].scores, scores, rtol=1e-4)
    if np.array_equal(found[2].labels + 1, expected.labels[expected.labels > 0]):
        np.testing.assert_allclose(found[2].boxes, expected.boxes[expected.labels > 0], atol=1e-2)


def test_a_stream(ready):
    video, network = images(4), ready("transvod_single_r50_vid").network
    whole, stream = detect(network, [Frame(t, image, str(t)) for t, image in enumerate(video)]), DetectionStream(network)
    for image, expected in zip(video, whole):
        found = stream.step(image)
        assert found.index == expected.index and len(found) == len(expected) > 0
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
    with pytest.raises(PyvsegError, match="take transvod_single"):
        DetectionStream(ready("transvod_r50_vid").network)


def test_a_saved_state_goes_on(ready, tmp_path):
    network, video = ready("transvod_lite_swin_b_vid").network, frames(7)
    whole = detect(network, video)
    begun = ObjectDetection(network)
    begun.step(video[:4])
    save_state(begun.state, tmp_path / "state.safetensors")
    for state in (load_state(tmp_path / "state.safetensors"), pickle.loads(pickle.dumps(begun.state))):
        rest = ObjectDetection(network, state)
        for start in (4, 6):
            rest.step(video[start : start + 2])
        assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(whole, rest.finish()))


def test_several_videos_and_a_data_set(ready, tmp_path):
    for name in "ab":
        write_images(tmp_path / "vid" / "Data" / "VID" / "val" / name, images(3))
    task = replace(ready("transvod_r50_vid"), results=Results(overlay=False))
    run(task, tmp_path / "vid" / "Data" / "VID" / "val", out=tmp_path / "folder", progress=False)
    loose = json.loads((tmp_path / "folder" / "results.json").read_text())
    assert {entry["image_id"] for entry in loose} == {f"{name}/{t}" for name in "ab" for t in range(3)}
    files = sorted(p.relative_to(tmp_path / "vid" / "Data" / "VID") for p in (tmp_path / "vid").rglob("*.png"))
    listed = [{"id": 10 + i, "file_name": str(p), "video_id": ord(p.parent.name), "height": 54, "width": 71} for i, p in enumerate(files)]
    size = pyvseg.video.open_video(tmp_path / "vid" / "Data" / "VID" / "val" / "a").size
    listed = [image | {"height": size[0], "width": size[1]} for image in listed]
    document = {
        "videos": [{"id": ord(name), "name": f"val/{name}"} for name in "ab"], "images": listed,
        "categories": [{"id": i, "name": name} for i, name in enumerate(task.classes, 1)],
    }  # fmt: skip
    boxes = [{"image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": entry["bbox"]} for entry in loose]
    (tmp_path / "vid" / "annotations").mkdir()
    path = tmp_path / "vid" / "annotations" / "val.json"
    path.write_text(json.dumps(document | {"annotations": []}))
    run(task, path, out=tmp_path / "vid_out", progress=False)
    found = json.loads((tmp_path / "vid_out" / "results.json").read_text())
    names = {f"{name}/{t}": 10 + 3 * (name == "b") + t for name in "ab" for t in range(3)}
    assert [entry | {"image_id": 0} for entry in found] == [entry | {"image_id": 0} for entry in loose]
    assert [entry["image_id"] for entry in found] == [names[entry["image_id"]] for entry in loose]
    best = {(entry["image_id"], entry["category_id"]): entry for entry in reversed(boxes)}  # one annotated object for each class
    annotated = [entry | {"image_id": names[entry["image_id"]]} for entry in best.values()]
    path.write_text(json.dumps(document | {"annotations": annotated}))
    assert main(["eval", str(tmp_path / "vid_out"), "--gt", str(path), "--protocol", "imagenet-vid", "--json", str(tmp_path / "scores.json")]) == 0
    totals = json.loads((tmp_path / "scores.json").read_text())["totals"]
    assert totals["AR100"] == 1 and 0.1 < totals["AP50"] <= 1
    assert main(["eval", str(tmp_path / "folder"), "--gt", str(path), "--protocol", "imagenet-vid"]) != 0


def test_errors(ready, small, tmp_path, capsys):
    task = ready("transvod_r50_vid")
    with pytest.raises(VideoError, match="no frames"):
        detect(task.network, [])
    with pytest.raises(VideoError, match="size changes from 71x54 to 20x30"):
        detect(task.network, [*frames(2), *frames(1, 30, 20)])
    write_images(tmp_path / "clip", images(2))
    command = ["run", str(tmp_path / "clip"), "--model", "transvod_r50_vid", "--weights", str(tmp_path / "transvod_r50_vid.safetensors")]
    assert main([*command, "--clip-length", "3"]) != 0 and "leave it out" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text('{"videos": []}')
    with pytest.raises(PyvsegError, match="not ImageNet VID"):
        run(task, tmp_path / "bad.json", out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_temporary_folder_that_is_too_small(ready, tmp_path, monkeypatch):
    write_images(tmp_path / "clip", images(9))
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(VideoError, match="9 frames take .* GB in the temporary folder .* TMPDIR"):
        run(ready("transvodpp_swin_b_vid"), tmp_path / "clip", out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "results.json").exists()


def test_ctrl_c_and_resume(ready, tmp_path, monkeypatch):
    write_images(tmp_path / "clip", images(9))
    task = replace(ready("transvod_r50_vid"), results=Results(overlay=False))
    run(task, tmp_path / "clip", out=tmp_path / "whole", progress=False)
    step = engine.DetectionLane.step

    def stop_at_four(lane):
        step(lane)
        if lane.done == 4:
            lane.session.stop.set()

    with monkeypatch.context() as patch:
        patch.setattr(engine.DetectionLane, "step", stop_at_four)
        with pytest.raises(KeyboardInterrupt, match="after 4 frames"):
            run(task, tmp_path / "clip", out=tmp_path / "cut", progress=False)
    summary = run(task, tmp_path / "clip", out=tmp_path / "cut", resume=True, progress=False)
    assert summary.frames == 5
    assert (tmp_path / "cut" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
