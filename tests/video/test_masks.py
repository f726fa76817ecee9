# SPDX-License-Identifier: Apache-2.0
import json
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from pyvseg.errors import VideoError
from pyvseg.video import open_video, read_labels, read_masks, write_labels
from pyvseg.video.palette import PALETTE
from pyvseg.video.png import decode_labels, encode_labels
from pyvseg.video.rle import decode_rle, encode_masks, encode_rle
from tests.conftest import shared
from tests.video.clips import images, square, write_images

labels_strategy = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.sampled_from([0, 1, 2, 7, 254, 255]))


@pytest.fixture
def video(tmp_path):
    return open_video(write_images(tmp_path / "clip", images(6)))


def two_objects() -> np.ndarray:
    labels = square(1)
    labels[30:40, 40:60] = 2
    return labels


def write_json(tmp_path, document):
    path = tmp_path / "masks.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@settings(max_examples=30, deadline=None)
@given(labels_strategy)
def test_png_round_trip(labels):
    data = encode_labels(labels)
    assert np.array_equal(decode_labels(data, "test"), labels)
    colours = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)  # another reader sees the palette
    assert np.array_equal(colours, PALETTE[labels])


def test_palette_is_that_of_davis():
    assert PALETTE[:10].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128], [0, 128, 128], [128, 128, 128], [64, 0, 0], [192, 0, 0],
    ]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(labels_strategy)
def test_rle_agrees_with_pycocotools(labels):
    for rle, object_id in zip(encode_rle(labels, (1, 2, 9)), (1, 2, 9), strict=True):
        expected = coco.decode(rle).astype(bool)
        assert np.array_equal(expected, labels == object_id)
        assert np.array_equal(decode_rle(rle, labels.shape, "test"), expected)


@settings(max_examples=30, deadline=None)
@given(labels_strategy)
def test_rle_of_tensors_is_that_of_arrays(labels):
    masks = np.stack([labels == i for i in (0, 1, 2, 9)])
    assert encode_masks(torch.from_numpy(masks)) == encode_masks(masks) == encode_rle(labels, (0, 1, 2, 9))


@pytest.mark.parametrize("counts", ["~~~~", "oooo", "5", "", [3000, 1], [4000], [-1, 3073], "x\u00e9", None, [[1]], ["a"]])
def test_damaged_rle(counts):
    with pytest.raises(VideoError, match="test: RLE"):
        decode_rle({"size": [48, 64], "counts": counts}, (48, 64), "test")


def test_palette_png(tmp_path, video):
    write_labels(tmp_path / "first.png", two_objects())
    masks = read_masks(tmp_path / "first.png", video)
    assert list(masks) == [0] and np.array_equal(masks[0], two_objects())


def test_grey_and_one_bit_png(tmp_path, video):
    cv2.imwrite(str(tmp_path / "grey.png"), two_objects())
    cv2.imwrite(str(tmp_path / "binary.png"), square(255))
    cv2.imwrite(str(tmp_path / "bilevel.png"), square(1), [cv2.IMWRITE_PNG_BILEVEL, 1])
    assert np.array_equal(read_masks(tmp_path / "grey.png", video)[0], two_objects())
    assert np.array_equal(read_masks(tmp_path / "binary.png", video)[0], square(1))  # 0 and 255 alone: a binary mask
    assert read_labels(tmp_path / "bilevel.png").max() == 1


def test_void_says_nothing(tmp_path, video):
    labels = two_objects()
    labels[:3] = 255
    write_labels(tmp_path / "first.png", labels)
    assert np.array_equal(read_masks(tmp_path / "first.png", video)[0], two_objects())


def test_small_palettes_of_other_writers(video):
    """Palette PNGs may store 1, 2 or 4 bits per pixel."""
    bits = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8)
    rows = b"".join(b"\0" + bytes([int("".join(f"{v:02b}" for v in row), 2)]) for row in bits)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    header = struct.pack(">IIBBBBB", 4, 2, 2, 3, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"PLTE", bytes(12)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(decode_labels(data, "test"), bits)


def test_binary_png_per_object(tmp_path, video):
    folder = tmp_path / "objects"
    folder.mkdir()
    cv2.imwrite(str(folder / "cat.png"), square(255))
    cv2.imwrite(str(folder / "dog.png"), (two_objects() == 2).astype(np.uint8) * 255)
    for source in (folder, [folder / "cat.png", folder / "dog.png"]):
        masks = read_masks(source, video)
        assert list(masks) == [0] and np.array_equal(masks[0], two_objects())


def test_folder_of_frames(tmp_path, video):
    folder = tmp_path / "annotations"
    folder.mkdir()
    write_labels(folder / "00000.png", square(1))
    write_labels(folder / "00004.png", square(2))
    masks = read_masks(folder, video)
    assert list(masks) == [0, 4] and np.array_equal(masks[4], square(2))


def test_arrays(video):
    assert np.array_equal(read_masks(square(3), video)[0], square(3))
    assert list(read_masks({4: square(2), 0: square(1).astype(bool)}, video)) == [0, 4]


def test_json_shapes(tmp_path, video):
    rle = encode_rle(square(1), [1])[0]
    document = {
        "width": 64,
        "height": 48,
        "objects": [
            {"id": 5, "polygon": [[10, 10], [30, 10], [30, 20], [10, 20]]},
            {"id": 2, "box": [40, 30, 20, 10]},
            {"id": 9, "segmentation": rle},
            {"id": 4, "segmentation": [[50, 2, 60, 2, 60, 6, 50, 6]]},
        ],
    }
    labels = read_masks(write_json(tmp_path, document), video)[0]
    assert (labels == 2).sum() == 200 and labels[35, 50] == 2
    assert labels[15, 25] == 5 and labels[4, 55] == 4
    assert np.array_equal(labels == 9, square(1) > 0)  # later objects lie on top


def test_json_several_frames_and_bare_rle(tmp_path, video):
    box = [{"id": 1, "box": [0, 0, 5, 5]}]
    assert list(read_masks(write_json(tmp_path, {"frames": [{"frame": 3, "objects": box}, {"frame": 1, "objects": box}]}), video)) == [1, 3]
    rles = encode_rle(two_objects(), [1, 2])
    assert np.array_equal(read_masks(write_json(tmp_path, rles), video)[0], two_objects())
    assert np.array_equal(read_masks(write_json(tmp_path, rles[0]), video)[0], square(1))


@pytest.mark.parametrize(
    "document, message",
    [
        ("{", "not valid JSON"),
        ({}, "labels are missing"),
        ({"objects": []}, "labels are missing"),
        ({"objects": [{"id": 1}]}, "expected"),
        ({"objects": [{"id": 1, "polygon": [[1, 2], [3, 4]]}]}, "3 points"),
        ({"objects": [{"id": 1, "polygon": "round"}]}, "expected"),
        ({"objects": [{"id": 1, "box": [1, 2, 3]}]}, "expected"),
        ({"objects": [{"id": 1, "box": [100, 100, 5, 5]}]}, "empty"),
        ({"objects": [{"id": 255, "box": [0, 0, 5, 5]}]}, "1 to 254"),
        ({"objects": [{"id": 0, "box": [0, 0, 5, 5]}]}, "1 to 254"),
        ({"objects": [{"box": [0, 0, 5, 5]}] * 256}, "at most 254 objects"),
        ({"width": 640, "height": 480, "objects": [{"id": 1, "box": [0, 0, 5, 5]}]}, "640x480 but"),
        ({"frame": 99, "objects": [{"id": 1, "box": [0, 0, 5, 5]}]}, "no such frame"),
        ({"objects": [{"id": 1, "segmentation": {"size": [480, 640], "counts": "0"}}]}, "video's size"),
    ],
)
def test_bad_json(tmp_path, video, document, message):
    with pytest.raises(VideoError, match=message) as caught:
        read_masks(write_json(tmp_path, document), video)
    assert "\n" not in str(caught.value)


def test_wrong_size(tmp_path, video):
    write_labels(tmp_path / "first.png", square(1, 24, 32))
    with pytest.raises(VideoError, match="first.png is 32x24 but .* is 64x48"):
        read_masks(tmp_path / "first.png", video)


def test_empty(tmp_path, video):
    write_labels(tmp_path / "first.png", square(0))
    with pytest.raises(VideoError, match="first.png is empty"):
        read_masks(tmp_path / "first.png", video)
    with pytest.raises(VideoError, match="no masks given"):
        read_masks({}, video)


def test_too_many_objects(tmp_path, video):
    cv2.imwrite(str(tmp_path / "deep.png"), np.arange(48 * 64, dtype=np.uint16).reshape(48, 64))
    cv2.imwrite(str(tmp_path / "one.png"), square(255))
    for source in (tmp_path / "deep.png", [tmp_path / "one.png"] * 255, np.arange(48 * 64).reshape(48, 64)):
        with pytest.raises(VideoError, match="at most 254 objects"):
            read_masks(source, video)


@pytest.mark.parametrize(
    "content, message", [(None, "no such"), (b"", "not a PNG"), (b"JPEG" * 20, "not a PNG"), ("cut", "damaged"), ("flipped", "damaged"), ("rgb", "RGB")]
)
def test_unreadable_png(tmp_path, video, content, message):
    path = tmp_path / "first.png"
    data = encode_labels(np.random.default_rng(0).integers(0, 9, (48, 64), np.uint8))
    if content == "rgb":
        cv2.imwrite(str(path), images(1)[0])
    elif content is not None:
        flipped = data[:1000] + bytes([data[1000] ^ 0xFF]) + data[1001:]
        path.write_bytes({"cut": data[: len(data) // 2], "flipped": flipped}.get(content, content))
    with pytest.raises(VideoError, match=message):
        read_masks(path, video)


def test_header_cannot_demand_any_memory(tmp_path, video):
    data = bytearray(encode_labels(square(1)))
    data[16:24] = struct.pack(">II", 1 << 20, 1 << 20)
    (tmp_path / "first.png").write_bytes(data)
    with pytest.raises(VideoError, match="limit"):
        read_masks(tmp_path / "first.png", video)


def test_published_annotations():
    labels = read_labels(shared("data", "davis2016", "Annotations", "480p", "camel", "00000.png"))
    assert labels.shape == (480, 854) and set(np.unique(labels)) == {0, 1}
