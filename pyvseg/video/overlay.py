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
    tinted = cv2.addWeighted(image, 1 - opacity, colours, opacity, 0)
    drawn = np.where((labels > 0)[..., None], tinted, image)
    thickness = 3 if min(labels.shape) < 720 else 5
    inner = cv2.erode(labels, np.ones((thickness, thickness), np.uint8))  # the smallest id nearby: differs from the label only inside, near a border
    border = (inner != labels)[..., None]
    return np.where(border, cv2.addWeighted(colours, 0.75, np.full_like(colours, 255), 0.25, 0), drawn)
