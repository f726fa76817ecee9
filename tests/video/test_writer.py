# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
from fractions import Fraction

import av
import numpy as np
import pytest
from pycocotools import mask as coco

from pyvseg.errors import OutputError
from pyvseg.video import FrameResult, draw_overlay, read_labels
from pyvseg.video.palette import PALETTE
from pyvseg.video.writer import OverlayWriter, PngWriter, RleWriter
from tests.video.clips import images, square


def results(count: int = 12, height: int = 48, width: int = 64) -> list[FrameResult]:
    """Object 1 throughout, object 3 from the fifth frame on, object 1 absent from the seventh."""
    frames = []
    for t, image in enumerate(images(count, height, width)):
        labels = np.roll(square(1, height, width), t, 1) * (t != 7)
        if t >= 5:
            labels[:4, :4] = 3
        frames.append(FrameResult(t, f"{t:05d}", image, labels, (1, 3) if t >= 5 else (1,)))
    return frames


def boxes(path) -> list[str]:
    """Names of an MP4's top-level boxes, in order."""
    data, position, names = path.read_bytes(), 0, []
    while position < len(data):
        names.append(data[position + 4 : position + 8].decode())
        position += int.from_bytes(data[position : position + 4], "big")
    return names


@pytest.mark.parametrize("height, width", [(48, 64), (47, 63)])
def test_overlay_is_what_browsers_play(tmp_path, height, width):
    frames = results(height=height, width=width)
    writer = OverlayWriter(tmp_path / "overlay.mp4", (height, width), Fraction(30000, 1001))
    for result in frames:
        writer.write(result)
    assert not (tmp_path / "overlay.mp4").exists()  # the name appears when the file is whole
    writer.close()
    names = boxes(tmp_path / "overlay.mp4")
    assert names.index("moov") < names.index("mdat")  # playback can start before the file is there
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.height, context.width) == ("h264", "yuv420p", 48, 64)
        assert stream.average_rate == Fraction(30000, 1001)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == len(frames)
    for image, result in zip(decoded, frames, strict=True):
        expected = draw_overlay(result.image, result.labels)
        assert np.abs(image[:height, :width].astype(int) - expected).mean() < 8


def test_overlay_colours_objects_and_nothing_else():
    image, labels = np.full((40, 40, 3), 100, np.uint8), np.zeros((40, 40), np.uint8)
    labels[5:20, 5:20], labels[25:35, 25:35] = 1, 200
    before = image.copy()
    drawn = draw_overlay(image, labels)
    assert np.array_equal(image, before) and (drawn[labels == 0] == 100).all()
    for object_id, (y, x) in ((1, (12, 12)), (200, (30, 30))):
        assert np.abs(drawn[y, x] - (0.55 * 100 + 0.45 * PALETTE[object_id])).max() <= 1


def test_png_writer(tmp_path):
    writer = PngWriter(tmp_path / "masks")
    for result in results():
        writer.write(result)
    writer.close()
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == [f"{t:05d}.png" for t in range(12)]
    assert all(np.array_equal(read_labels(tmp_path / "masks" / f"{r.name}.png"), r.labels) for r in results())


def test_rle_json(tmp_path):
    writer = RleWriter(tmp_path / "masks.json", "clip")
    for result in results():
        writer.write(result)
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["masks.json"]
    entries = json.loads((tmp_path / "masks.json").read_text())
    assert [(e["video_id"], e["object_id"], e["category_id"], e["score"]) for e in entries] == [("clip", 1, 1, 1.0), ("clip", 3, 1, 1.0)]
    for entry in entries:
        assert len(entry["segmentations"]) == 12
        for rle, result in zip(entry["segmentations"], results(), strict=True):
            expected = result.labels == entry["object_id"]
            assert (rle is None) == (not expected.any())
            assert rle is None or np.array_equal(coco.decode(rle).astype(bool), expected)


def test_rle_json_without_objects(tmp_path):
    writer = RleWriter(tmp_path / "masks.json", "clip")
    writer.close()
    assert json.loads((tmp_path / "masks.json").read_text()) == []


def make(kind: str, folder):
    return {
        "png": lambda: PngWriter(folder / "masks"),
        "mp4": lambda: OverlayWriter(folder / "overlay.mp4", (48, 64), None),
        "json": lambda: RleWriter(folder / "masks.json", "clip"),
    }[kind]()


@pytest.mark.parametrize("kind", ["png", "mp4", "json"])
def test_discard_leaves_no_unfinished_file(tmp_path, kind):
    writer = make(kind, tmp_path)
    writer.write(results()[0])
    writer.discard()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == (["00000.png"] if kind == "png" else [])


@pytest.mark.parametrize("kind", ["png", "mp4", "json"])
def test_unwritable(tmp_path, kind):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write .*file"):
        make(kind, tmp_path / "file")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
def test_full_disk_while_encoding(tmp_path):
    (tmp_path / "overlay.mp4.part").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="overlay.mp4: No space left"):
        writer = OverlayWriter(tmp_path / "overlay.mp4", (48, 64), None)
        for result in results(200):
            writer.write(result)
        writer.close()
    assert not (tmp_path / "overlay.mp4").exists()


def test_full_disk_leaves_no_half_png(tmp_path, monkeypatch):
    from pathlib import Path

    def fail(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = PngWriter(tmp_path / "masks")
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OutputError, match="00000.png: No space left on device"):
        writer.write(results()[0])
    assert list((tmp_path / "masks").iterdir()) == []
