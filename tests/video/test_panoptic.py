# SPDX-License-Identifier: Apache-2.0
import cv2
import numpy as np
import pytest

from pyvseg.errors import VideoError
from pyvseg.video.panoptic import read_ids, read_step, write_ids, write_step
from pyvseg.video.png import write_labels
from tests.conftest import shared

RNG = np.random.default_rng(0)


def test_ids_survive_and_stand_in_the_channels(tmp_path):
    ids = RNG.integers(0, 1 << 24, (7, 13))
    ids[0, :3] = 0, (1 << 24) - 1, 1 + 2 * 256 + 3 * 65536
    write_ids(tmp_path / "a.png", ids)
    assert (read_ids(tmp_path / "a.png") == ids).all()
    assert cv2.imread(str(tmp_path / "a.png"))[0, 2].tolist() == [3, 2, 1]  # B, G, R


def test_step_form_survives_and_stands_in_the_channels(tmp_path):
    classes, instances = RNG.integers(0, 256, (7, 13)), RNG.integers(0, 1 << 16, (7, 13))
    classes[0, 0], instances[0, 0] = 255, 1 * 256 + 2
    write_step(tmp_path / "a.png", classes, instances)
    for got, expected in zip(read_step(tmp_path / "a.png"), (classes, instances)):
        assert (got == expected).all()
    assert cv2.imread(str(tmp_path / "a.png"))[0, 0].tolist() == [2, 1, 255]


def test_what_does_not_fit_the_channels(tmp_path):
    one = np.ones((2, 3), np.int64)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 16777216\).* got 1 to 16777216"):
        write_ids(tmp_path / "a.png", one * [1, 1, 1 << 24])
    with pytest.raises(ValueError, match="instances must be in .* 65536"):
        write_step(tmp_path / "a.png", one, one * (1 << 16))
    with pytest.raises(ValueError, match="classes must be in .* 256"):
        write_step(tmp_path / "a.png", one * 256, one)
    assert not list(tmp_path.iterdir())


def test_other_pngs_are_refused(tmp_path):
    write_labels(tmp_path / "palette.png", np.zeros((4, 5), np.uint8))
    cv2.imwrite(str(tmp_path / "alpha.png"), np.zeros((4, 5, 4), np.uint8))
    write_ids(tmp_path / "cut.png", np.arange(600).reshape(20, 30))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:90])
    for name, message in (("palette", "not an RGB PNG of 8 bits"), ("alpha", "not an RGB PNG"), ("cut", "damaged"), ("absent", "cannot read")):
        with pytest.raises(VideoError, match=message) as caught:
            read_ids(tmp_path / f"{name}.png")
        assert f"{name}.png" in str(caught.value)


def test_stored_maps():
    path = shared("data", "camvid_step", "panoptic_maps", "0016E5_07959.png")
    blue, green, red = cv2.split(cv2.imread(str(path)))
    classes, instances = read_step(path)
    assert (classes == red).all() and (instances == green.astype(int) * 256 + blue).all()
    assert (read_ids(path) == red + 256 * green.astype(int) + 65536 * blue.astype(int)).all()
