# SPDX-License-Identifier: Apache-2.0
"""Boxes out: COCO results and an overlay video."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyvseg.video.overlay import draw_boxes
from pyvseg.video.writer import OverlayWriter, output_errors


@dataclass(frozen=True)
class BoxResult:
    """One frame: name and image as in `FrameResult`; boxes (N, 4) as x1, y1, x2, y2 in pixels, labels (N,) and texts to draw."""

    index: int
    name: str
    image: np.ndarray
    boxes: np.ndarray
    labels: Sequence[int]
    texts: Sequence[str]


def write_boxes(path: Path, frames: Iterable, ids: Sequence[int | str], categories: Sequence[int | None]) -> int:
    """`VideoDetections` in the form of COCO results, one entry per line and object; returns their number.

    [{"image_id": ID, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9, "category": "airplane"}, ...]

    ids: what the frames are called; categories: the category id of each class, None for classes that are left out.
    """
    separator, entries = "[", 0
    with output_errors(path), open(path, "w", encoding="ascii") as out:
        for frame, name in zip(frames, ids, strict=True):
            for (x1, y1, x2, y2), score, label, category in zip(frame.boxes.tolist(), frame.scores.tolist(), frame.labels.tolist(), frame.categories):
                if categories[label] is not None:
                    entry = {"image_id": name, "category_id": categories[label], "bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)], "score": score}
                    out.write(separator + json.dumps(entry | ({"category": category} if category else {})))
                    separator, entries = ",\n", entries + 1
        out.write("[]\n" if not entries else "]\n")
    return entries


class BoxOverlayWriter(OverlayWriter):
    """A video of the frames with their boxes and texts drawn in; a class keeps its colour."""

    def draw(self, result: BoxResult) -> np.ndarray:
        return draw_boxes(result.image, result.boxes, result.labels, result.texts)
