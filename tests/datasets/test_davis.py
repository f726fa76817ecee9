# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from pyvseg.datasets.davis import Davis
from pyvseg.errors import PyvsegError
from pyvseg.video.png import write_labels
from tests.conftest import shared


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize("between", ["", "480p/", "Full-Resolution/"])
def test_layouts(tmp_path, between):
    touch(tmp_path, *(f"JPEGImages/{between}bear/{stem}.jpg" for stem in ("00001", "00000", "00002")), f"JPEGImages/{between}bear/notes.txt")
    touch(tmp_path, f"Annotations/{between}bear/00000.png")
    davis = Davis(tmp_path)
    assert davis.sequences() == ["bear"]
    assert list(davis.frames("bear")) == ["00000", "00001", "00002"]
    assert davis.annotations("bear") == {"00000": tmp_path / f"Annotations/{between}bear/00000.png"}


def test_image_sets(tmp_path):
    touch(tmp_path, "Annotations/480p/bear/00000.png")
    for name, text in {
        "2017/val": "bear\ncamel\n\n",
        "480p/train": "/JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png\n/JPEGImages/480p/bear/00001.jpg /x/y.png\n",
    }.items():
        path = tmp_path / "ImageSets" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    davis = Davis(tmp_path)
    assert davis.sequences("2017/val") == ["bear", "camel"]
    assert davis.sequences("480p/train") == ["bear"]
    with pytest.raises(PyvsegError, match="this dataset has 2017/val, 480p/train"):
        davis.sequences("2016/val")


def test_what_is_not_there(tmp_path):
    with pytest.raises(PyvsegError, match="neither Annotations nor JPEGImages"):
        Davis(tmp_path)
    touch(tmp_path, "Annotations/bear/00000.png")
    with pytest.raises(PyvsegError, match="JPEGImages: no such folder"):
        Davis(tmp_path).frames("bear")
    with pytest.raises(PyvsegError, match="no .png files of sequence 'camel'"):
        Davis(tmp_path).annotations("camel")


def test_the_stored_sequences():
    davis = Davis(shared("data", "davis2016"))
    names = davis.sequences("sequences")
    assert names == davis.sequences() and len(names) == 8
    assert sum(len(davis.frames(name)) for name in names) == 510
    assert all(davis.frames(name).keys() == davis.annotations(name).keys() for name in names)


@pytest.mark.parametrize("values, expected", [((0, 1, 255), (0, 1, 0)), ((0, 255, 255), (0, 1, 1)), ((1, 2, 0), (1, 2, 0))])
def test_labels(tmp_path, values, expected):
    first = np.array([values], np.uint8)
    later = np.array([(0, 0, 255)], np.uint8)  # 255 keeps the meaning that it has in the first frame
    for name, labels in (("00000", first), ("00001", later)):
        touch(tmp_path, f"Annotations/bear/{name}.png")
        write_labels(tmp_path / f"Annotations/bear/{name}.png", labels)
    got = dict(Davis(tmp_path).labels("bear"))
    assert got["00000"].tolist() == [list(expected)]
    assert got["00001"].tolist() == [[0, 0, int(values == (0, 255, 255))]]
