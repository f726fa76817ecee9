# SPDX-License-Identifier: Apache-2.0
"""In place of pycocotools on machines that have none: COCO's run lengths of masks, in numpy."""

import numpy as np


def encode(masks: np.ndarray) -> dict | list[dict]:
    """uint8 (H, W) or (H, W, N), columns first in memory."""
    if masks.ndim == 3:
        return [encode(masks[..., i]) for i in range(masks.shape[2])]
    columns = masks.ravel(order="F")
    ends = np.concatenate([[0], np.flatnonzero(columns[1:] != columns[:-1]) + 1, [columns.size]])
    runs = np.diff(ends)
    return _rle(np.concatenate([[0], runs]) if columns[0] else runs, masks.shape)


def frPyObjects(rle: dict, height: int, width: int) -> dict:  # noqa: N802
    return _rle(np.array(rle["counts"], np.int64), (height, width))


def _rle(runs: np.ndarray, size: tuple[int, int]) -> dict:
    rest = runs.copy()
    rest[3:] -= runs[1:-2]
    codes, going = [], np.ones(len(runs), bool)
    while going.any():
        digit, rest = rest & 31, rest >> 5
        more = rest != np.where(digit & 16, -1, 0)
        codes.append(np.where(going, digit + 48 + 32 * more, 0).astype(np.uint8))
        going &= more
    code = np.stack(codes, 1)
    return {"size": list(size), "counts": code[code > 0].tobytes()}
