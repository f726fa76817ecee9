# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from pyvseg.cli.eval import Eval, eval
from pyvseg.datasets.kitti_step import KittiStep
from pyvseg.datasets.vipseg import VIPSeg
from pyvseg.errors import PyvsegError
from pyvseg.video.panoptic import write_ids, write_step
from tests.conftest import shared


def run(results, gt, protocol, **options):
    path = results.parent / "scores.json"
    path.unlink(missing_ok=True)
    eval(Eval(results, gt, protocol=protocol, json=path, **options))
    return json.loads(path.read_text())


def write_videos(lists, maps, videos, categories=()):
    """videos: name -> [(ids (H, W), [(id, category), ...]), ...]"""
    annotations, images = [], []
    for name, frames in videos.items():
        (maps / name).mkdir(parents=True, exist_ok=True)
        listed = []
        for t, (ids, segments) in enumerate(frames):
            write_ids(maps / name / f"{t:05d}.png", ids)
            infos = [{"id": int(s[0]), "category_id": int(s[1]), "iscrowd": int(s[2]) if len(s) > 2 else 0} for s in segments]
            listed.append({"file_name": f"{t:05d}.png", "segments_info": infos})
        annotations.append({"video_id": name, "annotations": listed})
        images.append({"video_id": name, "images": [{"file_name": f"{t:05d}.jpg"} for t in range(len(frames))]})
    content = {"annotations": annotations}
    if categories:
        content |= {"videos": images, "categories": [{"id": i, "name": f"class {i}", "isthing": int(i in things)} for i, things in categories]}
    lists.write_text(json.dumps(content))


@pytest.fixture
def vipseg(tmp_path):
    """Results and data set, two videos of 3 frames, 4 classes, things 2 and 3."""
    ids = np.zeros((8, 12), int)
    ids[:5], ids[5:, :4], ids[5:, 6:] = 7, 8, 100000
    videos = {name: [(ids, [(7, 0), (8, 2), (100000, 3)])] * 3 for name in ("a", "b")}
    results = {name: [(np.where(ids == 8, 0, ids), [(7, 0), (100000, 3)])] * 3 for name in ("a", "b")}
    data, out = tmp_path / "VIPSeg", tmp_path / "results"
    data.mkdir()
    out.mkdir()
    write_videos(data / "panoptic_gt_VIPSeg_val.json", data / "panomasksRGB", videos, [(i, (2, 3)) for i in range(4)])
    write_videos(out / "pred.json", out / "pan_pred", results)
    return out, data


def test_vipseg_by_hand(vipseg, capsys):
    scores = run(*vipseg, "vipseg", windows=(1, 2))
    assert scores["totals"]["VPQ"] == pytest.approx(100 * 2 / 3)
    assert (scores["totals"]["VPQ-Things"], scores["totals"]["VPQ-Stuff"]) == (50, 100)
    assert scores["totals"]["AQ"] == 0.5
    assert scores["totals"]["SQ"] == pytest.approx((1 + 0 + 1 + 0) / 4)  # void where something is annotated counts as one more class
    assert scores["classes"]["class 1"]["PQ, window 2"] is None
    assert list(scores["sequences"]) == ["a", "b"] and scores["left_out"] == []
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["sequence", "VPQ", "VPQ-Things", "VPQ-Stuff", "STQ", "AQ", "SQ"]
    assert out[3].split() == ["total", "66.67", "50.00", "100.00", "0.5000", "0.5000", "0.5000"]
    assert out[4] == "VPQ by window, all / things / stuff: 1: 66.67 / 50.00 / 100.00, 2: 66.67 / 50.00 / 100.00"


def test_some_videos_only(vipseg, capsys):
    assert run(*vipseg, "vipseg", sequences=("b",))["left_out"] == ["a"]
    assert "1 annotated sequences" in capsys.readouterr().out


def test_stored_case_through_folders(tmp_path):
    """The numbers of the published evaluation, from folders as a user has them."""
    case = shared("parity", "metrics-vps")
    config = json.loads((case / "manifest.json").read_text())["config"]
    out, data = tmp_path / "results", tmp_path / "data"
    out.mkdir()
    data.mkdir()
    with np.load(case / "tensors.npz") as tensors:
        parts = {"gt": (data / "panoptic_gt_VIPSeg_val.json", data / "panomasksRGB"), "pred": (out / "pred.json", out / "pan_pred")}
        for part, places in parts.items():
            videos = {v["video_id"]: list(zip(tensors[f"in/{v['video_id']}.{part}"], v[f"{part}_segments"])) for v in config["vipseg"]["videos"]}
            write_videos(*places, videos, [(i, config["vipseg"]["things"]) for i in range(124)] if part == "gt" else ())
        scores = run(out, data, "vipseg")
        assert list(scores["totals"].values())[:3] == pytest.approx(tensors["out/vpq.mean_all_thing_stuff"].tolist(), abs=1e-9)
        assert list(scores["totals"].values())[3:] == pytest.approx(tensors["out/stq.STQ_AQ_SQ"].tolist(), abs=1e-12)
        assert [each["STQ"] for each in scores["sequences"].values()] == pytest.approx(tensors["out/stq.STQ_per_seq"].tolist(), abs=1e-12)

        for i in range(config["kitti_step"]["sequences"]):
            for part, folder in (("gt", data / "panoptic_maps" / "val"), ("pred", tmp_path / "step")):
                (folder / f"{i:04d}").mkdir(parents=True)
                for t, labels in enumerate(tensors[f"in/step{i}.{part}"]):
                    write_step(folder / f"{i:04d}" / f"{t:06d}.png", labels >> 16, labels & 0xFFFF)
        scores = run(tmp_path / "step", data, "kitti-step")
        assert list(scores["totals"].values())[3:] == pytest.approx(tensors["out/step.STQ_AQ_SQ"].tolist(), abs=1e-12)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def spoil(kind, out, data):
    pred, truth, png = out / "pred.json", data / "panoptic_gt_VIPSeg_val.json", out / "pan_pred" / "b" / "00001.png"
    first = lambda content: content["annotations"][1]["annotations"][1]["segments_info"][0]  # noqa: E731
    if kind == "video":
        edit(pred, lambda content: content["annotations"].pop())
    elif kind == "frame":
        edit(pred, lambda content: content["annotations"][1]["annotations"].pop(1))
    elif kind == "another frame":
        edit(pred, lambda content: content["annotations"][1]["annotations"].append({"file_name": "9.png", "segments_info": []}))
    elif kind == "order":
        edit(pred, lambda content: content["annotations"][1]["annotations"].reverse())
    elif kind == "png":
        png.unlink()
    elif kind == "size":
        write_ids(png, np.full((8, 11), 7))
    elif kind == "other size":
        for t in range(3):
            write_ids(png.with_name(f"{t:05d}.png"), np.full((8, 11), 7))
    elif kind == "class":
        edit(pred, lambda content: first(content).update(category_id=4))
    elif kind == "class list":
        edit(pred, lambda content: content.update(categories=[{"id": i, "name": "x", "isthing": 0} for i in range(3)]))
    elif kind == "no class list":
        edit(truth, lambda content: content.pop("categories"))
    elif kind == "divisor":
        edit(pred, lambda content: first(content).update(id=1 << 24))
    elif kind == "unlisted":
        edit(pred, lambda content: first(content).update(id=9))
    elif kind == "huge":
        edit(pred, lambda content: first(content).update(id=10**30))
    elif kind == "no json":
        pred.unlink()
    elif kind == "cut json":
        pred.write_text(pred.read_text()[:50])
    elif kind == "other json":
        pred.write_text("[1, 2]")
    elif kind == "two lists":
        edit(truth, lambda content: content["videos"][1]["images"].pop())


@pytest.mark.parametrize(
    "kind, message",
    [
        ("video", "pred.json: 1 of 2 videos are missing, the first is b; --sequences"),
        ("frame", "b: .*pred.json: 1 of 3 frames are missing, the first is 00001"),
        ("another frame", "b: .*frame 9 is not annotated"),
        ("order", "b: .*not in the order"),
        ("png", "cannot read mask .*b/00001.png"),
        ("size", "b: .*pan_pred/b/00001.png: the size changes from 12x8 to 11x8"),
        ("other size", "b: 00000: the result is 11x8, its annotation 12x8"),
        ("class", "b: .*pred.json has category 4, which is none of the 4"),
        ("class list", "its 3 categories are not the 4 of .*: 3 is in one of them only"),
        ("no class list", 'no "categories"'),
        ("divisor", "b: 00001: the result lists segment id 16777216; ids go from 1 to 16777215"),
        ("unlisted", "b: 00001: the result's image holds segment id 7, which its list lacks"),
        ("huge", "pred.json: not in the form of panoptic videos"),
        ("no json", "pred.json: cannot be read"),
        ("cut json", "pred.json: damaged JSON"),
        ("other json", "pred.json: not in the form"),
        ("two lists", 'frames of video b differ between "videos" and "annotations"'),
    ],
)
def test_bad_input_gives_one_clear_line_and_no_file(vipseg, kind, message):
    spoil(kind, *vipseg)
    with pytest.raises(PyvsegError, match=message) as caught:
        run(*vipseg, "vipseg")
    assert "\n" not in str(caught.value)
    assert not (vipseg[0].parent / "scores.json").exists()


@pytest.fixture
def step(tmp_path):
    """Results and data set, two sequences of 2 frames: road, a car, a crowd of people and void."""
    classes = np.repeat([[0, 13, 11, 255]], 6, 0).repeat(3, 1)
    for sequence in ("0002", "0006"):
        for folder in (tmp_path / "data" / "panoptic_maps" / "val", tmp_path / "results"):
            (folder / sequence).mkdir(parents=True)
            for t in range(2):
                write_step(folder / sequence / f"{t:06d}.png", classes, np.where(classes == 13, 700, 0))
    return tmp_path / "results", tmp_path / "data"


def test_kitti_step_by_hand(step):
    totals = run(*step, "kitti-step", windows=(1, 2))["totals"]
    assert totals == {"VPQ": 100, "VPQ-Things": 100, "VPQ-Stuff": 100, "STQ": 1, "AQ": 1, "SQ": 1}  # the crowd asks for nothing
    path = step[0] / "0006" / "000001.png"
    write_step(path, np.repeat([[0, 13, 11, 255]], 6, 0).repeat(3, 1), np.repeat([[0, 701, 0, 0]], 6, 0).repeat(3, 1))
    totals = run(*step, "kitti-step", windows=(1, 2))["totals"]
    assert totals["AQ"] == pytest.approx((1 + 0.5) / 2)  # one of two cars changes its identity half way
    assert totals["SQ"] == 1 and totals["VPQ-Stuff"] == 100 and totals["VPQ-Things"] < 100


@pytest.mark.parametrize(
    "kind, message",
    [
        ("sequence", "1 of 2 videos are missing, the first is 0006"),
        ("frame", "0006: .*1 of 2 frames are missing, the first is 000001"),
        ("size", "0006: .*results/0006/000001.png: the size changes from 12x6 to 5x6"),
        ("class", "0006: 000001: the result's segment .* has class 26, but classes go from 0 to 18"),
        ("palette", "000001.png is not an RGB PNG"),
    ],
)
def test_bad_input_of_kitti_step(step, kind, message):
    from pyvseg.video.png import write_labels

    path = step[0] / "0006" / "000001.png"
    if kind in ("sequence", "frame"):
        path.unlink()
    if kind == "sequence":
        (path.parent / "000000.png").unlink()
        path.parent.rmdir()
    elif kind == "size":
        write_step(path, np.zeros((6, 5), int), np.zeros((6, 5), int))
    elif kind == "class":
        write_step(path, np.full((6, 12), 26), np.zeros((6, 12), int))
    elif kind == "palette":
        write_labels(path, np.zeros((6, 12), np.uint8))
    with pytest.raises(PyvsegError, match=message) as caught:
        run(*step, "kitti-step")
    assert "\n" not in str(caught.value)


def test_wrong_folders_and_protocols(vipseg, step):
    with pytest.raises(PyvsegError, match=r"neither Annotations.*looks like --protocol vipseg"):
        run(*vipseg, "davis")
    with pytest.raises(PyvsegError, match=r"no such file.*looks like --protocol kitti-step"):
        run(*step, "vipseg")
    with pytest.raises(PyvsegError, match="no such file; there are val"):
        VIPSeg(vipseg[1], "train")
    with pytest.raises(PyvsegError, match="no such folder; there are val"):
        KittiStep(step[1], "train")
    with pytest.raises(PyvsegError, match="no video c among the 2"):
        run(*vipseg, "vipseg", sequences=("c",))
    with pytest.raises(PyvsegError, match="each at least 1"):
        run(*vipseg, "vipseg", windows=(0, 2))
