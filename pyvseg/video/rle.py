# SPDX-License-Identifier: Apache-2.0
"""COCO run-length encoding: column-major runs, the first of zeros."""

import numpy as np

from pyvseg.errors import VideoError


def encode_rle(labels: np.ndarray, object_ids) -> list[dict]:
    """Compressed COCO RLE of each object in `labels`, uint8 (H, W); {"size": [H, W], "counts": str} per id."""
    from pycocotools import mask as coco

    columns = np.asfortranarray(labels)
    rles = [coco.encode(np.asfortranarray(columns == i, dtype=np.uint8)) for i in object_ids]
    return [{"size": [int(s) for s in rle["size"]], "counts": rle["counts"].decode("ascii")} for rle in rles]


def encode_masks(masks: np.ndarray) -> list[dict]:
    """Compressed COCO RLE of each of the masks, bool (N, H, W)."""
    from pycocotools import mask as coco

    if not len(masks):
        return []
    columns = np.ascontiguousarray(masks.transpose(0, 2, 1)).view(np.uint8)
    rles = coco.encode(columns.transpose(2, 1, 0))
    return [{"size": [int(s) for s in rle["size"]], "counts": rle["counts"].decode("ascii")} for rle in rles]


def decode_rle(rle: dict, size: tuple[int, int], name: str) -> np.ndarray:
    """A bool (H, W) mask from compressed or uncompressed COCO RLE; `size` (H, W) is what it must have.

    Decoded here and not by pycocotools, whose decoder trusts the runs and writes past the image when they are too long.
    Raises VideoError.
    """
    if list(rle.get("size", ())) != list(size):
        raise VideoError(f"{name}: RLE size {rle.get('size')} (height, width) is not the video's {list(size)}; masks must have the video's size")
    counts = rle.get("counts")
    try:
        runs = np.array(_runs(counts) if isinstance(counts, (str, bytes)) else counts, np.int64)
        valid = runs.ndim == 1 and (runs >= 0).all() and runs.sum() == size[0] * size[1]
    except (TypeError, ValueError, OverflowError, IndexError):
        valid = False
    if not valid:
        raise VideoError(f"{name}: RLE counts are damaged: they do not add up to {size[0]} x {size[1]} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(size, order="F")


def _runs(counts: str | bytes) -> list[int]:
    """COCO's string: 5 bits per character, low bits first, sign-extended; from the third run on, the difference to the run before the last."""
    text = counts.encode("ascii") if isinstance(counts, str) else counts
    runs, position = [], 0
    while position < len(text):
        value = shift = 0
        while True:
            code = text[position] - 48
            position += 1
            value |= (code & 0x1F) << shift
            shift += 5
            if not code & 0x20:
                break
        if code & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs
