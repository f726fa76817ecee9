# SPDX-License-Identifier: Apache-2.0
"""VSPW: semantic segmentation of videos in the wild, 124 classes.

ROOT/data/VIDEO/origin/FRAME.jpg, ROOT/data/VIDEO/mask/FRAME.png, ROOT/SPLIT.txt (a video a line), as released; evaluated at 480p.
Label PNGs hold class + 1; 0, 253 and 255 are void. Results are PNGs of the same form, RESULTS/VIDEO/FRAME.png, without void.
"""

from __future__ import annotations

from pathlib import Path

from pyvseg.errors import PyvsegError


class VSPW:
    """One split. Raises PyvsegError, here and from every method, where a file or folder is not there."""

    def __init__(self, root: str | Path, split: str = "val") -> None:
        self.root = Path(root)
        path = self.root / f"{split}.txt"
        try:
            self._videos = path.read_text().split()
        except (OSError, UnicodeDecodeError):
            known = ", ".join(sorted(each.stem for each in self.root.glob("*.txt")))
            raise PyvsegError(f"{path}: no such list; {f'there are {known}' if known else 'give the folder that holds data and val.txt'}") from None

    def videos(self) -> list[str]:
        """Names, in the order of the list."""
        return list(self._videos)

    def labels(self, video: str) -> dict[str, Path]:
        """Label PNGs by stem, in order."""
        return images_of(self.root / "data" / video / "mask", ".png")

    def images(self, video: str) -> dict[str, Path]:
        """Frames by stem, in order."""
        return images_of(self.root / "data" / video / "origin", ".jpg")


def images_of(folder: Path, suffix: str) -> dict[str, Path]:
    """Files of a folder by stem, in order."""
    files = {path.stem: path for path in sorted(folder.glob(f"*{suffix}"))}
    if not files:
        raise PyvsegError(f"{folder}: no {suffix} files there")
    return files
