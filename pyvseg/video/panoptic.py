# SPDX-License-Identifier: Apache-2.0
"""Panoptic maps as PNG: the two forms in which the field keeps a class and an instance per pixel.

COCO panoptic (also VIPSeg, Cityscapes-VPS): an id per segment, R + 256 G + 65536 B, 0 = void; a JSON file gives the class of each id.
STEP (KITTI-STEP, MOTChallenge-STEP): R is the class, 255 = void, and 256 G + B the instance, 0 = stuff or crowd; there is no JSON file.
"""

from pathlib import Path

import cv2
import numpy as np

from pyvseg.video.png import read_channels, write_channels

MAX_IDS = 1 << 24  # what three channels can tell apart
MAX_INSTANCES = 1 << 16  # per class, in the STEP form
STEP_VOID = 255


def read_ids(path: str | Path) -> np.ndarray:
    """The segment ids of a COCO panoptic PNG, int32 (H, W). Raises VideoError."""
    four = cv2.cvtColor(read_channels(path), cv2.COLOR_RGB2RGBA)
    ids = four.view("<i4")[..., 0]
    ids &= MAX_IDS - 1
    return ids


def write_ids(path: str | Path, ids: np.ndarray) -> None:
    """Writes segment ids, int (H, W) in [0, 2^24), as a COCO panoptic PNG: whole or not at all. Raises ValueError for other ids, OSError."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < MAX_IDS:
        raise ValueError(f"ids must be in [0, {MAX_IDS}) to fit three channels, got {ids.min()} to {ids.max()}")
    write_channels(path, ids.astype("<i4")[..., None].view(np.uint8)[..., :3])


def read_step(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Classes uint8 (H, W) and instances int32 (H, W) of a STEP PNG. Raises VideoError."""
    red, green, blue = cv2.split(read_channels(path))
    return red, (green.astype(np.int32) << 8) | blue


def write_step(path: str | Path, classes: np.ndarray, instances: np.ndarray) -> None:
    """Writes classes and instances, int (H, W), as a STEP PNG: whole or not at all.

    Raises ValueError for a class beyond 255 (255 is void) or an instance beyond 65535, OSError.
    """
    for name, values, limit in (("classes", classes, STEP_VOID + 1), ("instances", instances, MAX_INSTANCES)):
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < limit:
            raise ValueError(f"{name} must be in [0, {limit}) in the STEP form, got {values.min()} to {values.max()}")
    write_channels(path, np.stack((classes, instances >> 8, instances & 255), -1).astype(np.uint8))
