# SPDX-License-Identifier: Apache-2.0
"""Masks drawn over their frame."""

import cv2
import numpy as np

from pyvseg.video.palette import PALETTE

_LUT = PALETTE[None]  # (1, 256, 3), as cv2.LUT wants it


def draw_overlay(image: np.ndarray, labels: np.ndarray, opacity: float = 0.45) -> np.ndarray:
    """Tints every object in its palette colour and outlines it.

    image uint8 (H, W, 3) RGB and labels uint8 (H, W) -> uint8 (H, W, 3) RGB, a new array. An object keeps its colour
    through the whole video because the colour depends on its id alone.
    """
    colours = cv2.LUT(cv2.merge([labels, labels, labels]), _LUT)
    drawn = image.copy()
    cv2.copyTo(cv2.addWeighted(image, 1 - opacity, colours, opacity, 0), labels, drawn)
    thickness = 3 if min(labels.shape) < 720 else 5
    inner = cv2.erode(labels, np.ones((thickness, thickness), np.uint8))  # the smallest id nearby: another than the label only inside, near a border
    border = cv2.compare(inner, labels, cv2.CMP_NE)
    cv2.copyTo(cv2.addWeighted(colours, 0.75, colours, 0, 64), border, drawn)
    return drawn
