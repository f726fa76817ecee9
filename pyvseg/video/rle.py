# SPDX-License-Identifier: Apache-2.0
"""COCO run-length encoding: column-major runs, the first of zeros."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from pyvseg.errors import VideoError


def encode_rle(labels: np.ndarray, object_ids) -> list[dict]:
    """Compressed COCO RLE of each object in `labels`, uint8 (H, W); {"size": [H, W], "counts": str} per id."""
    from pycocotools import mask as coco

    columns = np.asfortranarray(labels)
    return _texts([coco.encode(np.asfortranarray(columns == i, dtype=np.uint8)) for i in object_ids])


def encode_masks(masks: np.ndarray | Tensor) -> list[dict]:
    """Compressed COCO RLE of each of the masks, bool (N, H, W). From a GPU only the ends of the runs come to main memory."""
    from pycocotools import mask as coco

    if not len(masks):
        return []
    if isinstance(masks, Tensor):
        height, width = masks.shape[1:]
        return _texts([coco.frPyObjects({"size": [height, width], "counts": runs}, height, width) for runs in _runs_of(masks)])
    columns = np.ascontiguousarray(masks.transpose(0, 2, 1)).view(np.uint8)
    return _texts(coco.encode(columns.transpose(2, 1, 0)))


def _runs_of(masks: Tensor) -> Iterator[list[int]]:
    """The runs of each mask, zeros first."""
    columns = masks.transpose(1, 2).flatten(1)
    mask, at = (columns[:, 1:] != columns[:, :-1]).nonzero().cpu().numpy().T
    starts = np.split(at + 1, np.searchsorted(mask, np.arange(1, len(masks))))
    for begins, set_first in zip(starts, columns[:, 0].cpu().numpy()):
        yield [0] * int(set_first) + np.diff(begins, prepend=0, append=columns.shape[1]).tolist()


def _texts(rles: list[dict]) -> list[dict]:
    return [{"size": [int(s) for s in rle["size"]], "counts": rle["counts"].decode("ascii")} for rle in rles]


def decode_rle(rle: dict, size: tuple[int, int], name: str) -> np.ndarray:
    """A bool (H, W) mask from compressed or uncompressed COCO RLE; `size` (H, W) is what it must have.

    Decoded here and not by pycocotools, whose decoder trusts the runs and writes past the image when they are too long.
    Raises VideoError.
    """
    runs, _ = decode_runs([rle], size, name)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size, order="F")


def decode_runs(rles: Sequence[dict], size: tuple[int, int], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The runs of many RLEs without their pixels: all runs one after the other, int64, and how many belong to each RLE.

    The runs of each RLE alternate, zeros first, and add up to `size` (H, W). Raises VideoError.
    """
    if not len(rles):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    for rle in rles:
        if rle.get("size") not in (list(size), tuple(size)):
            raise VideoError(f"{name}: RLE size {rle.get('size')} (height, width) is not the video's {list(size)}; masks must have the video's size")
    try:
        runs, lengths = _runs([rle.get("counts") for rle in rles])
        sums = np.add.reduceat(runs, np.cumsum(lengths) - lengths)
        valid = (lengths > 0).all() and (runs >= 0).all() and (sums == size[0] * size[1]).all()
    except (TypeError, ValueError, OverflowError, IndexError):
        valid = False
    if not valid:
        raise VideoError(f"{name}: RLE counts are damaged: they do not add up to {size[0]} x {size[1]} pixels")
    return runs, lengths


def _runs(counts: list) -> tuple[np.ndarray, np.ndarray]:
    """Runs and their number by RLE, compressed or not. Raises ValueError and its like."""
    if all(isinstance(each, (str, bytes)) for each in counts):
        return _decompress([each.encode("ascii") if isinstance(each, str) else each for each in counts])
    parts = [_runs([each])[0] if isinstance(each, (str, bytes)) else np.array(each, np.int64) for each in counts]
    return np.concatenate(parts), np.array([part.size for part in parts])


def _decompress(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """COCO's string: 5 bits per character, low bits first, sign-extended; from the third run on, the difference to the run before the last."""
    code = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - 48
    last = code & 0x20 == 0  # character of its number
    ends = np.flatnonzero(last)
    text_ends = np.cumsum([len(text) for text in texts])
    first = np.concatenate(([0], ends[:-1] + 1))
    width = 5 * (ends + 1 - first)
    if ((code < 0) | (code > 63)).any() or not all(map(len, texts)) or not last[text_ends - 1].all() or (width > 35).any():
        raise ValueError("not COCO's string")
    shift = 5 * (np.arange(len(code)) - np.repeat(first, width // 5))
    runs = np.add.reduceat((code & 0x1F) << shift, first)
    runs -= np.where(code[ends] & 0x10, 1 << width, 0)
    numbers = np.diff(np.searchsorted(ends, text_ends), prepend=0)
    place = np.arange(len(runs)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    for chain in ((place % 2 == 1), (place % 2 == 0) & (place > 0)):  # a run adds to the one before the last; run 2 begins anew
        value, begins = runs[chain], place[chain] <= 2
        total = np.cumsum(value)
        before = (total - value)[begins]
        runs[chain] = total - np.repeat(before, np.diff(np.flatnonzero(begins), append=len(value)))
    return runs, numbers
