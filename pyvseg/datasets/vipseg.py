# SPDX-License-Identifier: Apache-2.0
"""VIPSeg: panoptic segmentation of videos in the wild, 124 classes of which 58 are things.

As its own scripts leave it: ROOT/images/VIDEO/FRAME.jpg, ROOT/panomasksRGB/VIDEO/FRAME.png, ROOT/panoptic_gt_VIPSeg_SPLIT.json.
"""

from __future__ import annotations

from pathlib import Path

from pyvseg.datasets.coco_panoptic import PanopticVideos
from pyvseg.errors import PyvsegError

_LISTS = "panoptic_gt_VIPSeg_{}.json"


class VIPSeg(PanopticVideos):
    """One split: annotated videos (see `PanopticVideos`) and their images."""

    def __init__(self, root: str | Path, split: str = "val") -> None:
        """split: train, val or test. Raises PyvsegError that names the splits that are there."""
        self.root = Path(root)
        path = self.root / _LISTS.format(split)
        if not path.is_file():
            before, after = _LISTS.split("{}")
            known = sorted(each.name[len(before) : -len(after)] for each in self.root.glob(_LISTS.format("*")))
            there = f"there are {', '.join(known)}" if known else "VIPSeg's scripts make it, and panomasksRGB, from the released files"
            raise PyvsegError(f"{path}: no such file; {there}")
        super().__init__(path, self.root / "panomasksRGB")

    def images(self, video: str) -> dict[str, Path]:
        """The frames, by stem, in order."""
        return {stem: self.root / "images" / video / f"{stem}.jpg" for stem in self.segments(video)}
