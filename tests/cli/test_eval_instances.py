# SPDX-License-Identifier: Apache-2.0
import json
from types import SimpleNamespace

import numpy as np
import pytest

from pyvseg.cli.eval import Eval, eval
from pyvseg.errors import PyvsegError
from pyvseg.video.writer import write_tracks
from tests.conftest import shared


@pytest.fixture
def stored(tmp_path):
    """Annotations and results of the stored case, and its twelve numbers."""
    case = shared("parity", "metrics-ytvis")
    with np.load(case / "tensors.npz") as tensors:
        (tmp_path / "truth.json").write_bytes(tensors["in/ground_truth_json"].tobytes())
        (tmp_path / "results.json").write_bytes(tensors["in/results_json"].tobytes())
        return tmp_path, tensors["out/stats"].tolist()


def run(folder, results="results.json", **options):
    path = folder / "scores.json"
    path.unlink(missing_ok=True)
    eval(Eval(folder / results, folder / "truth.json", protocol="youtube-vis", json=path, **options))
    return json.loads(path.read_text())


def test_the_published_numbers(stored, capsys):
    folder, expected = stored
    scores = run(folder)
    assert list(scores["totals"].values()) == pytest.approx(expected, abs=1e-9)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["category", "AP", "AP50", "AP75", "AR1", "AR10"]
    assert lines[-1] == ["total", "24.8", "52.2", "13.4", "13.9", "58.6"]
    assert [line[0] for line in lines[1:-1]] == list(scores["categories"]) == ["c1", "c2", "c3"]


def test_runs_of_single_videos_name_them_by_folder(stored, capsys):
    folder, expected = stored
    entries = json.loads((folder / "results.json").read_text())
    for video in (1, 2, 3):
        out = folder / "runs" / f"out{video}"
        out.mkdir(parents=True)
        own = [entry | {"video_id": f"v{video - 1}"} for entry in entries if entry["video_id"] == video]
        (out / "results.json").write_text(json.dumps(own))
    assert list(run(folder, "runs")["totals"].values()) == pytest.approx(expected, abs=1e-9)
    capsys.readouterr()
    scores = run(folder, "runs/out2")
    assert scores["without_results"] == ["v0", "v2"] and 0 < scores["totals"]["AR10"] < expected[7]
    assert "2 of 3 videos have no results, so all their tracks count as missed (v0, v2)" in capsys.readouterr().out
    assert run(folder, "runs/out2", sequences=("v1",))["left_out"] == ["v0", "v2"]


def test_what_a_run_writes_can_be_scored(stored):
    """Annotated masks as a run would write them."""
    folder, _ = stored
    truth = json.loads((folder / "truth.json").read_text())
    (folder / "runs").mkdir()
    for video in (1, 2, 3):
        entries = [each for each in truth["annotations"] if each["video_id"] == video]
        tracks = [SimpleNamespace(label=each["category_id"] - 1, category="", score=0.5, object_id=each["id"], rle=each["segmentations"]) for each in entries]
        (folder / "runs" / f"{video}").mkdir()
        write_tracks(folder / "runs" / f"{video}" / "results.json", f"v{video - 1}", tracks)
    assert run(folder, "runs")["totals"]["AP"] == pytest.approx(1)


def spoil(kind, folder):
    path = folder / ("truth.json" if kind.startswith("truth") else "results.json")
    content = json.loads(path.read_text())
    if kind == "video":
        content[3]["video_id"] = "v9"
    elif kind == "category":
        content[3]["category_id"] = 40
    elif kind == "length":
        content[3]["segmentations"].pop()
    elif kind == "score":
        content[3]["score"] = float("nan")
    elif kind == "no score":
        del content[3]["score"]
    elif kind == "size":
        content[3]["segmentations"][0]["size"] = [5, 5]
    elif kind == "counts":
        content[3]["segmentations"][0]["counts"] += "zz"
    elif kind == "mask":
        content[3]["segmentations"][0] = 7
    elif kind == "list":
        content = {"annotations": []}
    elif kind == "truth without annotations":
        del content["annotations"]
    elif kind == "truth without tracks":
        content["annotations"] = []
    elif kind == "truth category":
        content["annotations"][0]["category_id"] = 40
    elif kind == "truth size":
        content["videos"][0]["height"] = 1e300
    elif kind == "truth areas":
        content["annotations"][0]["areas"].pop()
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("video", "results.json: video 'v9' is none of the 3 of truth.json"),
        ("category", "results.json: category 40 is none of the 4 of truth.json"),
        ("length", "results of v0: a track has segmentations for 5 frames, but the video has 6"),
        ("score", "results.json: not in the form of YouTube-VIS .* has the score nan"),
        ("no score", "results.json: not in the form of YouTube-VIS .*'score'"),
        ("size", r"results of v0: RLE size \[5, 5\]"),
        ("counts", "results of v0: RLE counts are damaged"),
        ("mask", "results of v0: a mask is neither COCO RLE nor polygons"),
        ("list", "results.json: not in the form of YouTube-VIS"),
        ("truth without annotations", "truth.json: not in the form .*test sets are not public"),
        ("truth without tracks", "no track is annotated"),
        ("truth category", "truth.json: not in the form .* has category 40, which is none of the 4"),
        ("truth size", "truth.json: not in the form .*at most"),
        ("truth areas", "truth.json: v0: a track has areas for 5 frames"),
    ],
)
def test_bad_input_gives_one_clear_line_and_no_file(stored, kind, message):
    spoil(kind, stored[0])
    with pytest.raises(PyvsegError, match=message) as caught:
        run(stored[0])
    assert "\n" not in str(caught.value)
    assert not (stored[0] / "scores.json").exists()


def test_wrong_arguments(stored, tmp_path):
    with pytest.raises(PyvsegError, match="no video 'x' among its 3"):
        run(stored[0], sequences=("x",))
    with pytest.raises(PyvsegError, match="--image-set val: this protocol has none"):
        run(stored[0], image_set="val")
    with pytest.raises(PyvsegError, match="neither a JSON of tracks nor a folder"):
        run(stored[0], "absent")
    with pytest.raises(PyvsegError, match="looks like --protocol youtube-vis"):
        eval(Eval(stored[0], stored[0] / "truth.json"))
