# SPDX-License-Identifier: Apache-2.0
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from pyvseg.errors import VideoError
from pyvseg.video import open_video, reader
from tests.video.clips import images, write_images, write_video


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mjpeg")])
def test_video_files(tmp_path, name, codec):
    expected = images(30)
    video = open_video(write_video(tmp_path / name, expected, codec=codec))
    frames = list(video)
    assert (video.size, video.fps, video.frame_count, video.name) == ((48, 64), Fraction(25), 30, "a")
    assert [f.index for f in frames] == list(range(30)) and frames[7].name == "00007"
    for frame, image in zip(frames, expected, strict=True):
        assert frame.image.dtype == np.uint8
        assert np.abs(frame.image.astype(int) - image).mean() < 8  # lossy codecs; a frame out of place differs by more
    assert np.abs(frames[0].image.astype(int) - expected[20]).mean() > 8


def test_iterating_again_starts_again(tmp_path):
    video = open_video(write_video(tmp_path / "a.mp4", images(12)))
    assert sum(1 for _ in video) == sum(1 for _ in video) == 12


def test_folder_in_order_of_names(tmp_path):
    expected = images(4)
    folder = write_images(tmp_path / "clip", expected)
    (folder / "notes.txt").write_text("not a frame")
    video = open_video(folder)
    assert [f.name for f in video] == ["00000", "00001", "00002", "00003"]
    assert all(np.array_equal(f.image, image) for f, image in zip(video, expected, strict=True))


@pytest.mark.parametrize("kind", [list, np.stack, iter])
def test_arrays(kind):
    expected = images(5)
    video = open_video(kind(expected))
    assert all(np.array_equal(f.image, image) for f, image in zip(video, expected, strict=True))


def test_part_keeps_frame_names(tmp_path):
    expected = images(12)
    part = open_video(write_video(tmp_path / "a.mp4", expected)).part(3, 7)
    assert [(f.index, f.name) for f in part] == [(0, "00003"), (1, "00004"), (2, "00005"), (3, "00006")]
    part = open_video(write_images(tmp_path / "clip", expected)).part(10, None)
    assert [(f.index, f.name) for f in part] == [(0, "00010"), (1, "00011")] and part.frame_count == 2
    with pytest.raises(VideoError, match="12 frames"):
        open_video(tmp_path / "a.mp4").part(12, 20)


def test_rotation_metadata_turns_frames_upright(tmp_path):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, :32] = 255  # left half bright
    path = write_video(tmp_path / "a.mp4", [image] * 3)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)  # 90 degrees clockwise
    path.write_bytes(data)
    video = open_video(path)
    upright = next(iter(video)).image
    assert video.size == (64, 48) and upright[:28].min() > 200 and upright[36:].max() < 60  # the left half is on top now


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("name, options", [("a.mp4", {}), ("a.mp4", {"movflags": "faststart"}), ("a.mkv", {})])
def test_truncated(tmp_path, name, options, share):
    path = write_video(tmp_path / name, images(60), **options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(VideoError, match=f"{name}.*cut short"):
        list(open_video(path))


@pytest.mark.parametrize("content", [b"", b"no video", bytes(range(256)) * 40])
def test_unreadable(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match="a.mp4.*cannot be read"):
        open_video(path)


def test_missing(tmp_path):
    with pytest.raises(VideoError, match="no such"):
        open_video(tmp_path / "a.mp4")


def test_no_video_stream(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(VideoError, match="a.wav: no video stream"):
        open_video(tmp_path / "a.wav")


def test_zero_frames(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    (tmp_path / "empty").mkdir()
    for source, message in ((tmp_path / "a.mkv", "a.mkv"), (tmp_path / "empty", "no images"), ([], "no frames")):
        with pytest.raises(VideoError, match=message):
            open_video(source)


def test_changing_resolution_names_the_frame(tmp_path):
    small, large = images(3), images(3, 64, 80)
    folder = write_images(tmp_path / "clip", small + large)
    for name, frames in (("one.h264", small), ("two.h264", large)):
        write_video(tmp_path / name, frames)
    joined = tmp_path / "joined.h264"
    joined.write_bytes((tmp_path / "one.h264").read_bytes() + (tmp_path / "two.h264").read_bytes())
    for source in (folder, joined, small + large):
        with pytest.raises(VideoError, match="frame 00003 is 80x64 but the video began with 64x48"):
            list(open_video(source))


def test_unreadable_image_is_named(tmp_path):
    folder = write_images(tmp_path / "clip", images(3))
    (folder / "00001.png").write_bytes(b"no image")
    with pytest.raises(VideoError, match="00001.png is damaged"):
        list(open_video(folder))


def test_headers_cannot_demand_any_memory(tmp_path, monkeypatch):
    path, folder = write_video(tmp_path / "a.mp4", images(3)), write_images(tmp_path / "clip", images(1))
    monkeypatch.setattr(reader, "MAX_PIXELS", 48 * 64 - 1)
    for source in (path, folder):
        with pytest.raises(VideoError):
            open_video(source)


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)])
def test_arrays_of_another_form(bad):
    with pytest.raises(VideoError, match="frame 0: got .* must be uint8"):
        open_video([bad])
