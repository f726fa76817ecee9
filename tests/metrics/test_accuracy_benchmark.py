# SPDX-License-Identifier: Apache-2.0
import json

import cv2
import numpy as np
import pytest

import pyvseg
from benchmarks import accuracy
from pyvseg.datasets.davis import Davis
from pyvseg.errors import PyvsegError
from pyvseg.video.png import write_labels
from tests.conftest import shared


@pytest.fixture
def data(tmp_path):
    """A DAVIS-style sequence of two textured objects that move right, one twice as fast."""
    rng = np.random.default_rng(0)
    scene, patches = (cv2.GaussianBlur(rng.integers(0, 255, (96, 160), np.uint8), (5, 5), 0) for _ in range(2))
    for t in range(6):
        image, labels = scene.copy(), np.zeros((96, 160), np.uint8)
        for i, (top, speed) in enumerate(((10, 2), (55, 4)), start=1):
            image[top : top + 30, 20 + speed * t : 60 + speed * t] = patches[top : top + 30, 20:60]
            labels[top : top + 30, 20 + speed * t : 60 + speed * t] = i
        for part in ("JPEGImages", "Annotations"):
            (tmp_path / part / "seq").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "JPEGImages" / "seq" / f"{t:05d}.jpg"), cv2.merge([image] * 3))
        write_labels(tmp_path / "Annotations" / "seq" / f"{t:05d}.png", labels)
    return tmp_path


class PerfectTracker:
    def __init__(self, root):
        self.dataset = Davis(root)

    def track(self, video, masks, *, clip_length):
        assert list(masks) == [0]
        for _, labels in self.dataset.labels(video.name):
            yield type("Result", (), {"labels": labels})


def test_baselines_and_model_are_scored_alike(data, monkeypatch, capsys):
    monkeypatch.setattr(pyvseg, "load", lambda name, **options: PerfectTracker(data), raising=False)
    monkeypatch.setattr("sys.argv", ["accuracy", "--data", str(data), "--clip-lengths", "1", "5", "--out", str(data / "out")])
    assert accuracy.main() == 0
    methods = json.loads((data / "out" / "accuracy.json").read_text())["methods"]
    assert list(methods) == ["first mask copied", "optical flow", "pcvos_tiny, clip 1", "pcvos_tiny, clip 5"]
    totals = [method["totals"]["J&F-Mean"] for method in methods.values()]
    assert totals[0] + 0.05 < totals[1] < 1
    assert totals[2] == totals[3] == 1
    assert (data / "out" / "accuracy.md").read_text() == capsys.readouterr().out


def test_unreadable_frame(data):
    (data / "JPEGImages" / "seq" / "00002.jpg").write_bytes(b"no image")
    with pytest.raises(PyvsegError, match="00002.jpg"):
        accuracy.evaluate(accuracy.Options(data, clip_lengths=()))


def test_copy_of_a_real_sequence():
    results = accuracy.evaluate(accuracy.Options(shared("data", "davis2016"), sequences=("car-shadow",), clip_lengths=()))
    copied, flow = results["methods"].values()
    assert copied["totals"]["J&F-Mean"] == pytest.approx(0.330, abs=1e-3)
    assert flow["totals"]["J&F-Mean"] == pytest.approx(0.615, abs=2e-2)
