# SPDX-License-Identifier: Apache-2.0
"""`pyvseg.load(...)` for instance segmentation: whole videos and live streams."""

import numpy as np
import pytest

import pyvseg
from pyvseg.errors import PyvsegError, VideoError
from tests.video.clips import images, write_video


@pytest.fixture
def load(small):
    return lambda name: pyvseg.load(name, weights=small(name))


def test_tracks_of_a_video(load, tmp_path):
    model = load("minvis_r50_ytvis21")
    found = model.segment(write_video(tmp_path / "clip.mp4", images(6)), top=5)
    assert len(found) == 5 and [t.score for t in found] == sorted((t.score for t in found), reverse=True)
    for track in found:
        assert track.category == model.classes[track.label] and len(track) == 6 and track.masks.shape == (6, 48, 64)
        assert all((mask := track.mask(t)) is None or np.array_equal(mask, track.masks[t]) for t in range(6))
    objects = [track.object_id for track in model.segment(images(6), compat=False)]
    assert len(objects) == len(set(objects))
    with pytest.raises(VideoError, match="no frames"):
        model.segment([])


@pytest.mark.parametrize("name", ["minvis_r50_ytvis21", "ctvis_r50_ovis", "genvis_r50_ytvis19_online"])
def test_a_stream_ends_where_the_whole_video_does(name, load):
    """Masks, classes and ids of a frame are those of the whole video; scores too, but for a factor that only the end knows."""
    model = load(name)
    frames = images(9)
    stream = model.stream(score_threshold=0)
    for image in frames:
        last = stream.step(image)
    assert last.index == 8 and last.masks.shape == (len(last.object_ids), 48, 64) and last.masks.any((1, 2)).all()
    assert last.categories == [model.classes[label] for label in last.labels]
    whole = {track.object_id: track for track in model.segment(frames, top=999, compat=False)}
    for name, label, mask in zip(last.object_ids, last.labels, last.masks):
        assert whole[name].label == label and (whole[name].mask(8) != mask).mean() < 0.01
    assert len(stream.segmentation.state.masks) == 0
    assert len(model.stream(score_threshold=1.1).step(frames[0]).masks) == 0


def test_streams_that_cannot_be(load):
    for name, message in (("vita_r50_ytvis19", "whole video"), ("genvis_r50_ytvis19_semionline", "every 3 frames"), ("mask2former_video_r50_ytvis19", "whole")):
        with pytest.raises(PyvsegError, match=message):
            load(name).stream()
    stream = load("minvis_r50_ytvis21").stream()
    stream.step(images(1)[0])
    with pytest.raises(VideoError, match="from 64x48 to 64x50"):
        stream.step(images(1, 50)[0])
