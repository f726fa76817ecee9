# SPDX-License-Identifier: Apache-2.0
"""COCO run-length encoding: column-major runs, the first of zeros."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pyvseg.errors import VideoError


def encode_rle(labels: np.ndarray, object_ids) -> list[dict]:
    """Compressed COCO RLE of each object in `labels`, uint8 (H, W); {"size": [H, W], "counts": str} per id."""
    columns = np.ascontiguousarray(labels.T).ravel()
    at = np.flatnonzero(columns[1:] != columns[:-1]) + 1
    before, after = columns[at - 1], columns[at]
    changes = [at[(before == i) != (after == i)] for i in object_ids]
    set_first = np.array([len(columns) > 0 and columns[0] == i for i in object_ids], bool)
    return _rles(np.concatenate([np.zeros(0, np.int64), *changes]), np.array([len(each) for each in changes], np.int64), set_first, labels.shape)


def encode_masks(masks: np.ndarray | Tensor) -> list[dict]:
    """Compressed COCO RLE of each of the masks, bool (N, H, W). From a GPU only the ends of the runs come to main memory."""
    count, pixels = len(masks), masks.shape[1] * masks.shape[2]
    if isinstance(masks, Tensor):
        columns = masks.transpose(1, 2).flatten()
        at = (columns[1:] != columns[:-1]).nonzero()[:, 0].cpu().numpy() + 1
    else:
        columns = np.ascontiguousarray(masks.transpose(0, 2, 1)).ravel()
        at = np.flatnonzero(columns[1:] != columns[:-1]) + 1
    at = at[at % max(pixels, 1) != 0]  # there the next mask begins
    row = at // max(pixels, 1)
    set_first = columns[::pixels].cpu().numpy() if isinstance(masks, Tensor) else columns[:: max(pixels, 1)]
    return _rles(at - row * pixels, np.bincount(row, minlength=count), set_first, masks.shape[1:])


def _rles(changes: np.ndarray, counts: np.ndarray, set_first: np.ndarray, size: tuple[int, int]) -> list[dict]:
    """changes (C,): where the runs but the first of each mask begin, mask by mask; how many there are of each; whether its first pixel is set."""
    if not len(counts):
        return []
    number = counts + 2 + set_first  # of the runs' ends, 0 in front; a run of no zeros comes first where the first pixel is set
    last = np.cumsum(number) - 1
    ends = np.zeros(last[-1] + 1, np.int64)
    ends[last] = size[0] * size[1]
    ends[np.arange(len(changes)) + np.repeat(last - np.cumsum(counts), counts)] = changes
    runs = np.delete(np.diff(ends), last[:-1])
    return [{"size": [int(s) for s in size], "counts": text} for text in _texts(runs, number - 1)]


def _texts(runs: np.ndarray, numbers: np.ndarray) -> list[str]:
    """COCO's strings, which `_decompress` describes, of `numbers` runs each."""
    starts = np.cumsum(numbers) - numbers
    later = np.arange(len(runs)) - np.repeat(starts, numbers) > 2
    rest = runs - np.where(later, np.concatenate([[0, 0], runs[:-2]])[: len(runs)], 0)
    codes, going = [], np.ones(len(runs), bool)
    while going.any():
        digit, rest = rest & 31, rest >> 5
        more = rest != np.where(digit & 16, -1, 0)
        codes.append(np.where(going, digit + 48 + 32 * more, 0).astype(np.uint8))
        going &= more
    code = np.stack(codes, 1)
    text, ends = code[code > 0].tobytes().decode("ascii"), np.cumsum(np.add.reduceat((code > 0).sum(1), starts))
    return [text[a:b] for a, b in zip((0, *ends[:-1]), ends)]


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
