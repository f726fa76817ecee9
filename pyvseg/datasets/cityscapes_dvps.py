# SPDX-License-Identifier: Apache-2.0
"""Cityscapes-DVPS: driving scenes of six frames with panoptic maps and depth.

ROOT/video_sequence/SPLIT/SEQUENCE_FRAME_..._leftImg8bit.png with ..._gtFine_instanceTrainIds.png (16 bits: class * 1000 + instance,
classes from 19 on are void) and ..._depth.png (see `pyvseg.video.depth`) beside it. Results are those of `pyvseg run` on the split:
OUT/pan_pred/SEQUENCE/..._leftImg8bit.png and OUT/depth/SEQUENCE/..._leftImg8bit.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyvseg.errors import PyvsegError
from pyvseg.video.png import read_numbers

IMAGE, MAP, DEPTH = "_leftImg8bit.png", "_gtFine_instanceTrainIds.png", "_depth.png"
DIVISOR = 1000
CLASSES = 19


class Annotated(NamedTuple):
    """Files of one frame."""

    image: Path
    map: Path
    depth: Path


def frames_of(folder: Path) -> dict[str, list[Path]]:
    """Images of each sequence in a split's folder, in order; none in a folder of another kind."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"*{IMAGE}")):
        if len(parts := path.name.split("_")) > 2 and parts[0].isdigit() and parts[1].isdigit():
            found.setdefault(parts[0], []).append(path)
    return found


class CityscapesDVPS:
    """One split. Raises PyvsegError where a folder or an annotation is not there."""

    def __init__(self, root: str | Path, split: str = "val") -> None:
        self.folder = Path(root) / "video_sequence" / split
        if not self.folder.is_dir():
            raise PyvsegError(f"{self.folder}: no such folder; give the folder that holds video_sequence")
        self.images = frames_of(self.folder)
        if not self.images:
            raise PyvsegError(f"{self.folder}: no frames SEQUENCE_FRAME_...{IMAGE} in there")

    def sequences(self) -> list[str]:
        return list(self.images)

    def frames(self, sequence: str) -> list[Annotated]:
        return [Annotated(path, *(path.with_name(path.name.removesuffix(IMAGE) + end) for end in (MAP, DEPTH))) for path in self.images[sequence]]


def read_map(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Classes by train id, int32 (H, W), from 19 on void, and instances int32 (H, W). Raises VideoError."""
    return np.divmod(read_numbers(path).astype(np.int32), DIVISOR)
