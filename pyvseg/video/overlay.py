# SPDX-License-Identifier: Apache-2.0
"""Masks and boxes drawn over their frame."""

from collections.abc import Sequence

import cv2
import numpy as np

from pyvseg.video.palette import PALETTE

_LUT = PALETTE[None]  # (1, 256, 3), as cv2.LUT wants it


def draw_overlay(image: np.ndarray, labels: np.ndarray, opacity: float = 0.45) -> np.ndarray:
    """Tints every object in its palette colour and outlines it.

    image uint8 (H, W, 3) RGB and labels uint8 (H, W) -> uint8 (H, W, 3) RGB, a new array. An object keeps its colour
    through the whole video because the colour depends on its id alone.
    """
    thickness = 3 if min(labels.shape) < 720 else 5
    drawn, box = image.copy(), _box(labels, thickness)
    image, labels, inside = image[box], labels[box], drawn[box]
    colours = cv2.LUT(cv2.merge([labels, labels, labels]), _LUT)
    cv2.copyTo(cv2.addWeighted(image, 1 - opacity, colours, opacity, 0), labels, inside)
    inner = cv2.erode(labels, np.ones((thickness, thickness), np.uint8))  # the smallest id nearby: another than the label only inside, near a border
    border = cv2.compare(inner, labels, cv2.CMP_NE)
    cv2.copyTo(cv2.addWeighted(colours, 0.75, colours, 0, 64), border, inside)
    return drawn


def _box(labels: np.ndarray, margin: int) -> tuple[slice, slice]:
    """Rows and columns that hold every object and so many pixels around; at least one of each."""
    left, top, width, height = cv2.boundingRect(labels)
    return slice(max(top - margin, 0), top + height + margin), slice(max(left - margin, 0), left + width + margin)


def draw_captions(image: np.ndarray, labels: np.ndarray, captions: dict[int, str]) -> None:
    """Writes each object's id and caption onto the top of its mask, in place, below others that are there already.

    image uint8 (H, W, 3), labels uint8 (H, W)
    """
    scale = max(min(labels.shape) / 1000, 0.35)
    thickness = max(1, round(2 * scale))
    taken: list[tuple[int, int, int]] = []  # left, right, bottom
    for i, text in captions.items():
        rows = np.flatnonzero((labels == i).any(1))
        if len(rows):
            columns = np.flatnonzero(labels[rows[0]] == i)
            text = f"{i} {text}"
            (width, height), baseline = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
            x = int(np.clip(columns.mean() - width / 2, 0, max(labels.shape[1] - width, 0)))
            y, line = max(int(rows[0]), height + 2), height + baseline
            for left, right, bottom in sorted(taken, key=lambda box: box[2]):
                if x < right and left < x + width and abs(y - bottom) < line:
                    y = bottom + line
            taken.append((x, x + width, y))
            _write(image, text, x, y, scale, thickness)


def draw_boxes(image: np.ndarray, boxes: np.ndarray, labels: Sequence[int], texts: Sequence[str]) -> np.ndarray:
    """Frames the boxes in the palette colours of their labels and writes each text onto its box, earlier ones on top.

    image uint8 (H, W, 3) RGB, boxes (N, 4) as x1, y1, x2, y2 in pixels -> uint8 (H, W, 3) RGB, a new array
    """
    image, (rows, columns) = image.copy(), image.shape[:2]
    scale = max(min(rows, columns) / 1000, 0.35)
    thickness = max(1, round(2 * scale))
    bound = 4 * max(rows, columns)  # a network may say anything
    for box, label, text in reversed(list(zip(boxes, labels, texts))):
        x1, y1, x2, y2 = np.nan_to_num(box).clip(-bound, bound).round().astype(int).tolist()
        cv2.rectangle(image, (x1, y1), (x2, y2), PALETTE[1 + label % 255].tolist(), 2 * thickness)
        (width, height), baseline = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
        x, y = min(max(x1, 0), max(columns - width, 0)), min(max(y1 - baseline, height + 2), rows - baseline)
        _write(image, text, x, y, scale, thickness)
    return image


def _write(image: np.ndarray, text: str, x: int, y: int, scale: float, thickness: int) -> None:
    """White, outlined in black: a thicker text would be a wider one."""
    for dx, dy, colour in ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, 255)):
        cv2.putText(image, text, (x + dx, y + dy), cv2.FONT_HERSHEY_SIMPLEX, scale, (colour,) * 3, thickness, cv2.LINE_AA)
