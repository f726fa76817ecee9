# SPDX-License-Identifier: Apache-2.0
"""KITTI-STEP, and data sets laid out like it: panoptic maps of driving scenes in the STEP form, without lists of segments.

ROOT/panoptic_maps/SPLIT/SEQUENCE/FRAME.png (see `pyvseg.video.panoptic`), ROOT/images/SPLIT/SEQUENCE/FRAME.png. Annotated pixels of
a thing without an instance (0) are crowd. Results are PNGs of the same form, RESULTS/SEQUENCE/FRAME.png.
"""

from __future__ import annotations

from pathlib import Path

from pyvseg.errors import PyvsegError

CLASSES = tuple(  # Cityscapes' train ids
    "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person rider car truck bus train motorcycle bicycle".split()
)
THINGS = (CLASSES.index("person"), CLASSES.index("car"))


class KittiStep:
    """One split. Raises PyvsegError, here and from every method, where a folder is not there or empty."""

    def __init__(self, root: str | Path, split: str = "val") -> None:
        self.root, self.split = Path(root), split
        folder = self.root / "panoptic_maps" / split
        if not folder.is_dir():
            known = sorted(path.name for path in (self.root / "panoptic_maps").glob("*") if path.is_dir())
            raise PyvsegError(f"{folder}: no such folder; {'there are ' + ', '.join(known) if known else 'give the folder that holds panoptic_maps'}")

    def sequences(self) -> list[str]:
        """Names, in order."""
        return sorted(path.name for path in (self.root / "panoptic_maps" / self.split).iterdir() if path.is_dir())

    def maps(self, sequence: str) -> dict[str, Path]:
        """Panoptic maps by stem, in order."""
        return pngs(self.root / "panoptic_maps" / self.split / sequence)

    def images(self, sequence: str) -> dict[str, Path]:
        """Frames by stem, in order."""
        return pngs(self.root / "images" / self.split / sequence)


def pngs(folder: str | Path) -> dict[str, Path]:
    """PNGs of a folder by stem, in order."""
    files = {path.stem: path for path in sorted(Path(folder).glob("*.png"))}
    if not files:
        raise PyvsegError(f"{folder}: no .png files there")
    return files
