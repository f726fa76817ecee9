# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from pyvseg.cli.eval import Eval, eval
from pyvseg.cli.main import main
from pyvseg.errors import PyvsegError
from pyvseg.metrics import vos
from pyvseg.video.png import write_labels
from tests.conftest import shared


def write(folder, volume, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    for i, labels in enumerate(volume):
        write_labels(folder / f"{i:05d}.png", labels)


@pytest.fixture
def volumes():
    """Annotations and results of one sequence, two objects, (6, 40, 60)."""
    truth, result = np.zeros((2, 6, 40, 60), np.uint8)
    for t in range(6):
        truth[t, 5:20, 5 + t : 25 + t] = 1
        truth[t, 25:35, 10:30] = 2
        result[t, 6:20, 4 + 2 * t : 25 + t] = 1
        result[t, 25:33, 12:30] = 2
    return truth, result


@pytest.fixture
def folders(tmp_path, volumes):
    write(tmp_path / "gt" / "Annotations" / "480p" / "bear", volumes[0])
    write(tmp_path / "results" / "bear", volumes[1])
    return tmp_path / "results", tmp_path / "gt"


def run(folders, **options):
    path = folders[0].parent / "scores.json"
    eval(Eval(*folders, json=path, **options))
    return json.loads(path.read_text())


def test_table_and_json_hold_the_scores(folders, volumes, capsys):
    scores = run(folders)
    expected = vos.totals({"bear": vos.sequence_scores(list(zip(*volumes))[1:-1], 2)})
    assert scores["totals"] == pytest.approx(expected, abs=1e-15)
    assert 0.5 < scores["totals"]["J-Mean"] < 1
    assert set(scores["sequences"]["bear"]["objects"]) == {"1", "2"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["sequence", "object", *vos.COLUMNS]
    assert [line.split()[:2] for line in lines[1:4]] == [["bear", "1"], ["bear", "2"], ["bear", "all"]]
    assert lines[4].split() == ["total", *(f"{expected[column]:.3f}" for column in vos.COLUMNS)]


def test_void_is_background(folders, volumes):
    before = run(folders)["totals"]
    truth = volumes[0].copy()
    truth[2, :5] = vos.VOID
    write(folders[1] / "Annotations" / "480p" / "bear", truth)
    assert run(folders)["totals"] == before


def test_an_object_that_is_void_in_a_later_frame_does_not_turn_into_object_1(folders, volumes):
    truth = volumes[0].copy()
    truth[2] = np.where(truth[2] > 0, vos.VOID, 0)
    write(folders[1] / "Annotations" / "480p" / "bear", truth)
    cleared = np.where(truth == vos.VOID, 0, truth)
    expected = vos.totals({"bear": vos.sequence_scores(list(zip(cleared, volumes[1]))[1:-1], 2)})
    assert run(folders)["totals"] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("truth_value, result_value", [(1, 1), (255, 255), (255, 1), (1, 255)])
def test_one_object_may_be_stored_as_255(tmp_path, volumes, truth_value, result_value):
    truth, result = ((volume == 1).astype(np.uint8) for volume in volumes)
    folders = tmp_path / "results", tmp_path / "gt"
    write(folders[1] / "Annotations" / "bear", truth * truth_value)
    write(folders[0] / "bear", result * result_value)
    expected = vos.totals({"bear": vos.sequence_scores(list(zip(truth, result))[1:-1], 1)})
    assert run(folders)["totals"] == pytest.approx(expected, abs=1e-15)


def test_sequences_without_results_are_named(folders, volumes, capsys):
    write(folders[1] / "Annotations" / "480p" / "camel", volumes[0])
    assert run(folders)["left_out"] == ["camel"]
    assert "1 annotated sequences" in capsys.readouterr().out
    with pytest.raises(PyvsegError, match="camel: 4 of 4 result PNGs are missing, the first is 00001.png"):
        run(folders, sequences=("bear", "camel"))


def test_image_set(folders, volumes):
    path = folders[1] / "ImageSets" / "2017" / "val.txt"
    path.parent.mkdir(parents=True)
    path.write_text("bear\n")
    assert list(run(folders, image_set="2017/val")["sequences"]) == ["bear"]


def spoil(folders, volumes, kind):
    results, gt = folders[0] / "bear", folders[1] / "Annotations" / "480p" / "bear"
    if kind == "missing":
        (results / "00003.png").unlink()
    elif kind == "more objects":
        write_labels(results / "00003.png", volumes[1][3] * 2)
    elif kind == "size":
        write_labels(results / "00003.png", volumes[1][3][:-1])
    elif kind == "colour":
        import cv2

        cv2.imwrite(str(results / "00003.png"), np.zeros((40, 60, 3), np.uint8))
    elif kind == "cut":
        (results / "00003.png").write_bytes((results / "00003.png").read_bytes()[:60])
    elif kind == "no object":
        write_labels(gt / "00000.png", volumes[0][0] * 0)
    elif kind == "short":
        for path in sorted(gt.iterdir())[2:]:
            path.unlink()


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "bear: 1 of 4 result PNGs are missing, the first is 00003.png"),
        ("more objects", "bear 00003: the result has object id 4, the first annotation only ids up to 2"),
        ("size", "bear 00003: the result is 60x39, its annotation 60x40"),
        ("colour", "RGB"),
        ("cut", "damaged"),
        ("no object", "bear: the first annotation shows no object"),
        ("short", "bear: no frame to score"),
    ],
)
def test_bad_input_gives_one_clear_line_and_no_file(folders, volumes, kind, message):
    spoil(folders, volumes, kind)
    with pytest.raises(PyvsegError, match=message) as caught:
        run(folders)
    assert "\n" not in str(caught.value)
    assert not (folders[0].parent / "scores.json").exists()


def test_wrong_folders(folders, tmp_path):
    with pytest.raises(PyvsegError, match="no such folder of results"):
        run((tmp_path / "absent", folders[1]))
    with pytest.raises(PyvsegError, match="named like a sequence"):
        run((tmp_path, folders[1]))
    with pytest.raises(PyvsegError, match="neither Annotations"):
        run((folders[0], tmp_path))


def test_real_predictions(tmp_path):
    expected = json.loads((shared("data", "davis_predictions") / "expected.json").read_text())["results"]
    folders = shared("data", "davis_predictions", "osvos"), shared("data", "davis2016")
    eval(Eval(*folders, sequences=("blackswan", "car-shadow"), json=tmp_path / "scores.json"))
    for name, got in json.loads((tmp_path / "scores.json").read_text())["sequences"].items():
        assert got["J-Mean"] == pytest.approx(expected[name]["J_mean"], abs=1e-9)
        assert got["F-Mean"] == pytest.approx(expected[name]["F_mean"], abs=1e-9)
        assert got["J&F-Mean"] == pytest.approx(expected[name]["J_and_F"], abs=1e-9)


def test_exit_status(folders, capsys):
    results, truth = map(str, folders)
    assert main(["eval", results, "--gt", truth, "--sequences", "bear"]) == 0
    assert main(["eval", results, "--gt", truth, "--sequences", "camel"]) == 2
    assert capsys.readouterr().err.startswith("pyvseg: error: ")


def test_stored_case_through_png_folders(tmp_path):
    """The numbers of the official tool, from folders as a user has them."""
    with np.load(shared("parity", "metrics-vos") / "tensors.npz") as case:
        for name in ("alpha", "beta", "gamma", "delta", "eps"):
            write(tmp_path / "gt" / "Annotations" / "480p" / name, case[f"in/{name}/gt"])
            write(tmp_path / "results" / name, case[f"in/{name}/result"])
        scores = run((tmp_path / "results", tmp_path / "gt"))
        assert list(scores["totals"].values()) == pytest.approx(case["out/global"].tolist(), abs=1e-12)
        for name in ("alpha_1", "beta_3", "gamma_2", "eps_1"):
            sequence, number = name.split("_")
            assert scores["sequences"][sequence]["objects"][number]["F-Mean"] == pytest.approx(case[f"out/{name}/F"].mean(), abs=1e-12)
