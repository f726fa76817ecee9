# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from pyvseg.datasets.youtube_vos import YouTubeVOS
from pyvseg.errors import PyvsegError

META = {
    "videos": {
        "b": {"objects": {"3": {"category": "dog", "frames": ["00010", "00015"]}, "1": {"frames": ["00005", "00010"]}}},
        "a": {"objects": {}},
    }
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps(META))
    for name in ("JPEGImages/b/00005.jpg", "JPEGImages/b/00010.jpg", "Annotations/b/00005.png", "Annotations/b/00010.png", "dense/b/00005.jpg", "dense/b/00006.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_reads_a_split(root):
    split = YouTubeVOS(root)
    assert split.videos() == ["a", "b"]
    assert split.objects("b") == {1: None, 3: "dog"}
    assert split.first_appearances("b") == {1: "00005", 3: "00010"}
    assert split.required_frames("b") == ["00005", "00010", "00015"]
    assert list(split.frames("b")) == ["00005", "00010"]
    assert list(split.annotations("b")) == ["00005", "00010"]
    assert list(YouTubeVOS(root, frames=root / "dense").frames("b")) == ["00005", "00006"]


def test_what_is_not_there(root, tmp_path):
    with pytest.raises(PyvsegError, match="no video 'c' among its 2"):
        YouTubeVOS(root).required_frames("c")
    with pytest.raises(PyvsegError, match="no .jpg"):
        YouTubeVOS(root).frames("a")
    with pytest.raises(PyvsegError, match="such as ROOT/valid"):
        YouTubeVOS(root / "Annotations")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"videos": 3}', '{"videos": {"a": {"objects": {"x": {"frames": []}}}}}', '{"videos": {"a": {"objects": {"1": {"frames": 3}}}}}'])
def test_other_json(root, text):
    (root / "meta.json").write_text(text)
    with pytest.raises(PyvsegError, match="not the meta.json of YouTube-VOS"):
        YouTubeVOS(root)
