# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from pyvseg.cli.eval import Eval, eval
from pyvseg.errors import PyvsegError
from pyvseg.metrics import vss
from pyvseg.video.png import write_labels
from tests.conftest import shared


@pytest.mark.parametrize("frames", [2, 3, 4, 9])
def test_consistency_is_the_definition(frames):
    rng = np.random.default_rng(frames)
    labels, results = (rng.random((2, frames, 15, 20)) < 0.2).astype(np.uint8)
    got = vss.Consistency((2, 3))
    for frame in zip(labels, results):
        got.update(*frame)
    for n, values in got.values().items():
        expected = []
        for i in range(frames - n):  # the last window is left out
            same = [(volume[i : i + n] == volume[i]).all(0) for volume in (labels, results)]
            expected.append((same[0] & same[1]).sum() / same[0].sum())
        assert values.tolist() == expected


@pytest.fixture
def folders(tmp_path):
    """The stored videos as released, and the published numbers."""
    with np.load(shared("parity", "metrics-vspw") / "tensors.npz") as case:
        for i in range(4):
            for part, folder in (("label", tmp_path / "VSPW" / "data" / f"v{i}" / "mask"), ("pred", tmp_path / "results" / f"v{i}")):
                folder.mkdir(parents=True)
                for t, image in enumerate(case[f"in/{part}{i}"]):
                    write_labels(folder / f"{t:08d}.png", image)
        (tmp_path / "VSPW" / "val.txt").write_text("v0\nv1\nv2\nv3\n")
        numbers = [*case["out/standard"], *case["out/mvc8"], *case["out/mvc16"], *case["out/raw_script"]]
        return tmp_path / "results", tmp_path / "VSPW", numbers


def run(results, gt, **options):
    path = results.parent / "scores.json"
    eval(Eval(results, gt, protocol="vspw", json=path, **options))
    return json.loads(path.read_text())


def test_the_published_numbers(folders, capsys):
    scores = run(*folders[:2])
    assert list(scores["totals"].values()) == pytest.approx(folders[2], abs=1e-12)
    assert scores["sequences"]["v1"]["mVC8"] is None  # 8 frames have no window of 8 but the last
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["mIoU", f"{100 * folders[2][0]:.2f}"] and lines[4].startswith("mVC8")
    assert run(*folders[:2], sequences=("v2",))["left_out"] == ["v0", "v1", "v3"]


@pytest.mark.parametrize(
    "kind, message",
    [
        ("void", "v2: the result holds the value 0; every pixel needs its class"),
        ("class", "v2: the result holds the value 125; every pixel needs its class"),
        ("size", "v2: .*v2/00000003.png: the size changes from 36x24 to 36x23"),
        ("other size", "v2: 00000000: the result is 36x23, its annotation 36x24"),
        ("frame", "v2: .*1 of 17 frames are missing, the first is 00000003"),
        ("video", "1 of 4 videos are missing, the first is v2"),
        ("list", "test.txt: no such list; there are val"),
    ],
)
def test_bad_input_gives_one_clear_line_and_no_file(folders, kind, message):
    results, gt, _ = folders
    path = results / "v2" / "00000003.png"
    if kind in ("void", "class"):
        write_labels(path, np.full((24, 36), 125 * (kind == "class"), np.uint8))
    elif kind == "size":
        write_labels(path, np.ones((23, 36), np.uint8))
    elif kind == "other size":
        for other in path.parent.iterdir():
            write_labels(other, np.ones((23, 36), np.uint8))
    elif kind == "frame":
        path.unlink()
    elif kind == "video":
        path.parent.rename(results / "v9")
    with pytest.raises(PyvsegError, match=message) as caught:
        run(results, gt, image_set="test" if kind == "list" else None)
    assert "\n" not in str(caught.value)
    assert not (results.parent / "scores.json").exists()


def test_sizes_that_change_within_a_video():
    consistency = vss.Consistency()
    consistency.update(*np.ones((2, 4, 5), np.uint8))
    with pytest.raises(PyvsegError, match="the size changes from 5x4 to 6x4"):
        consistency.update(*np.ones((2, 4, 6), np.uint8))
