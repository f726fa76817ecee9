# SPDX-License-Identifier: Apache-2.0
"""Panoptic results out, frame by frame: COCO panoptic PNGs and their JSON, STEP PNGs, maps of depth, an overlay video. Nothing is kept
in memory.

Writers are as those of `pyvseg.video.writer`: `write(result)`, `close()`, `discard()`, OutputError where the disk refuses.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyvseg.video.depth import write_depth
from pyvseg.video.panoptic import STEP_VOID, write_ids, write_step
from pyvseg.video.png import write_labels
from pyvseg.video.types import FrameResult
from pyvseg.video.writer import OverlayWriter, output_errors


@dataclass(frozen=True)
class PanopticResult:
    """One frame: name and image as in `FrameResult`; values (H, W) int32 = category * divisor + id, 0 = void; segments the values
    that occur, rising; depth float32 (H, W) in metres, of models that see it."""

    index: int
    name: str
    image: np.ndarray
    values: np.ndarray
    segments: tuple[int, ...]
    depth: np.ndarray | None = None


@dataclass(frozen=True)
class PanopticClasses:
    """What values mean: names and things by category, and the divisor."""

    names: tuple[str, ...]
    things: frozenset[int]
    divisor: int

    def category(self, value: int) -> int:
        return value // self.divisor

    def entries(self) -> list[dict]:
        return [{"id": i, "name": name, "isthing": int(i in self.things)} for i, name in enumerate(self.names)]


class PanopticPngWriter:
    """FOLDER/NAME.png for every frame, in the form of COCO panoptic; each file is whole as soon as it has its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, result: PanopticResult) -> None:
        path = self.folder / f"{result.name}.png"
        with output_errors(path):
            write_ids(path, result.values)

    def close(self) -> None:
        pass

    def discard(self) -> None:
        pass  # finished frames are worth keeping; the engine removes the folder where they are not


class StepPngWriter(PanopticPngWriter):
    """The same in the form of KITTI-STEP: stuff has instance 0, void class 255."""

    def __init__(self, folder: Path, classes: PanopticClasses) -> None:
        super().__init__(folder)
        self.classes = classes

    def write(self, result: PanopticResult) -> None:
        category, instance = np.divmod(result.values, self.classes.divisor)
        is_thing = np.isin(category, list(self.classes.things))
        category = np.where(result.values > 0, category, STEP_VOID)
        path = self.folder / f"{result.name}.png"
        with output_errors(path):
            write_step(path, category, np.where(is_thing, instance, 0))


class SemanticPngWriter(PanopticPngWriter):
    """The classes alone in the form of VSPW: one channel, class + 1, 0 = void."""

    def __init__(self, folder: Path, classes: PanopticClasses) -> None:
        super().__init__(folder)
        self.classes = classes

    def write(self, result: PanopticResult) -> None:
        path = self.folder / f"{result.name}.png"
        with output_errors(path):
            write_labels(path, np.where(result.values > 0, result.values // self.classes.divisor + 1, 0).astype(np.uint8))


class DepthPngWriter(PanopticPngWriter):
    """FOLDER/NAME.png of 16 bits for every frame, see `pyvseg.video.depth`."""

    def write(self, result: PanopticResult) -> None:
        path = self.folder / f"{result.name}.png"
        with output_errors(path):
            write_depth(path, result.depth)


class PanopticJsonWriter:
    """{"video_id": NAME, "annotations": [{"file_name": "00000.png", "segments_info": [{"id", "category_id", "isthing"}, ...]}, ...]}"""

    def __init__(self, path: Path, video_name: str, classes: PanopticClasses) -> None:
        self.path, self.temporary, self.classes, self.frames = path, Path(f"{path}.part"), classes, 0
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.temporary, "w", encoding="utf-8")
            self.file.write(f'{{"video_id": {json.dumps(video_name)}, "annotations": [\n')

    def write(self, result: PanopticResult) -> None:
        categories = [self.classes.category(value) for value in result.segments]
        segments = [
            {"id": value, "category_id": category, "isthing": int(category in self.classes.things)}
            for value, category in zip(result.segments, categories)
        ]
        with output_errors(self.path):
            self.file.write((",\n" if self.frames else "") + json.dumps({"file_name": f"{result.name}.png", "segments_info": segments}))
        self.frames += 1

    def close(self) -> None:
        with output_errors(self.path):
            self.file.write("]}\n")
            self.file.close()
            os.replace(self.temporary, self.path)

    def discard(self) -> None:
        with suppress(OSError):
            self.file.close()
        self.temporary.unlink(missing_ok=True)


def join_panoptic(parts: Sequence[Path], path: Path, classes: PanopticClasses) -> None:
    """The files of several `PanopticJsonWriter`s in one, with the list of categories: the form of VIPSeg's annotations and results."""
    temporary = Path(f"{path}.part")
    with output_errors(path):
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(f'{{"categories": {json.dumps(classes.entries())},\n"annotations": [\n')
            for i, part in enumerate(parts):
                out.write(",\n" if i else "")
                with open(part, encoding="utf-8") as file:
                    shutil.copyfileobj(file, out)
            out.write("]}\n")
        os.replace(temporary, path)


class PanopticOverlayWriter(OverlayWriter):
    """Segments in palette colours that depend on their value alone, with the names of their classes."""

    def __init__(self, path: Path, size: tuple[int, int], fps, classes: PanopticClasses) -> None:
        super().__init__(path, size, fps)
        self.classes = classes

    def write(self, result: PanopticResult) -> None:
        labels, captions = np.zeros(result.values.shape, np.uint8), {}
        colours = {value: self._colour(value) for value in result.segments}
        if result.segments:
            values = np.array([0, *result.segments])
            table = np.array([0, *(colours[value] for value in result.segments)], np.uint8)
            labels = table[np.searchsorted(values, result.values)]
        for value in result.segments:
            category = self.classes.category(value)
            captions[colours[value]] = self.classes.names[category] if category < len(self.classes.names) else f"class {category}"
        super().write(FrameResult(result.index, result.name, result.image, labels, tuple(colours.values()), captions))

    def _colour(self, value: int) -> int:
        category = self.classes.category(value)
        return segment_colour(value, category, category in self.classes.things)


def segment_colour(value: int, category: int, is_thing: bool) -> int:
    """A place in the palette, 1 to 255: far apart for neighbouring categories and, with a divisor of 10000, ids."""
    return 1 + (177 * category + 31 * value if is_thing else 97 * category) % 255
