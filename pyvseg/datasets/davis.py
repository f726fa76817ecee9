# SPDX-License-Identifier: Apache-2.0
"""DAVIS 2016 and 2017, and every folder laid out like them: ROOT/JPEGImages[/480p]/SEQUENCE, ROOT/Annotations[/480p]/SEQUENCE."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pyvseg.errors import PyvsegError
from pyvseg.video.png import read_labels

VOID = 255
RESOLUTIONS = ("480p", "Full-Resolution")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class Davis:
    """A DAVIS-style folder. Frames and masks belong together by their file names' stems; sequences are folders.

    Raises PyvsegError, here and from every method, where a folder or file is not there.
    """

    def __init__(self, root: str | Path, resolution: str | None = None) -> None:
        """resolution: the folder between "Annotations" and the sequences; by default 480p, else Full-Resolution, else none."""
        self.root = Path(root)
        self.resolution = resolution
        if not (self.root / "Annotations").is_dir() and not (self.root / "JPEGImages").is_dir():
            raise PyvsegError(f"{self.root}: neither Annotations nor JPEGImages is in there; give the folder that holds them")

    def sequences(self, image_set: str | None = None) -> list[str]:
        """Names in the list ROOT/ImageSets/`image_set`.txt ("2017/val"), or every sequence that has a folder."""
        if image_set is None:
            part = "Annotations" if (self.root / "Annotations").is_dir() else "JPEGImages"
            return sorted(path.name for path in self._part(part).iterdir() if path.is_dir())
        path = self.root / "ImageSets" / f"{image_set}.txt"
        try:
            lines = path.read_text().split("\n")
        except (OSError, UnicodeDecodeError):
            known = sorted(str(p.relative_to(self.root / "ImageSets").with_suffix("")) for p in (self.root / "ImageSets").rglob("*.txt"))
            raise PyvsegError(f"{path}: no such list; this dataset has {', '.join(known) or 'none'}") from None
        return list(dict.fromkeys(_sequence_name(line) for line in lines if line.strip()))

    def frames(self, sequence: str) -> dict[str, Path]:
        """Images of a sequence by stem, in order."""
        return self._files("JPEGImages", sequence, IMAGE_SUFFIXES)

    def annotations(self, sequence: str) -> dict[str, Path]:
        """Label PNGs of a sequence by stem, in order; test sets have only the first."""
        return self._files("Annotations", sequence, (".png",))

    def labels(self, sequence: str) -> Iterator[tuple[str, np.ndarray]]:
        """Stem and label image (H, W) uint8 of every annotation, in order: 0 = background and void, 1..K = objects.

        A sequence whose first annotation holds only 0 and 255 is stored as in DAVIS 2016: there 255 is object 1.
        """
        binary = None
        for stem, path in self.annotations(sequence).items():
            labels = read_labels(path)
            if binary is None:
                binary = is_binary(labels)
            yield stem, (labels == VOID).astype(np.uint8) if binary else np.where(labels == VOID, 0, labels)

    def _part(self, part: str) -> Path:
        folder = self.root / part
        if not folder.is_dir():
            raise PyvsegError(f"{folder}: no such folder; a DAVIS-style dataset keeps its {'masks' if part == 'Annotations' else 'frames'} there")
        if self.resolution is not None:
            return folder / self.resolution
        return next((folder / name for name in RESOLUTIONS if (folder / name).is_dir()), folder)

    def _files(self, part: str, sequence: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
        folder = self._part(part) / sequence
        files = {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in suffixes}
        if not files:
            raise PyvsegError(f"{folder}: no {' or '.join(suffixes)} files of sequence {sequence!r} there")
        return files


def is_binary(labels: np.ndarray) -> bool:
    """Whether a label image holds one object as 255, which is void elsewhere."""
    return np.array_equal(np.unique(labels), (0, VOID))


def _sequence_name(line: str) -> str:
    """DAVIS 2016's own lists hold pairs of paths, "/JPEGImages/480p/bear/00000.jpg /Annotations/...", the later ones names."""
    first = Path(line.split()[0])
    return first.parent.name if first.suffix else first.name
