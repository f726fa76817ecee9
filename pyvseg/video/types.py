# SPDX-License-Identifier: Apache-2.0
"""What travels through the engine: frames in, label images out."""

from dataclasses import dataclass

import numpy as np


@dataclass(slots=True)
class Frame:
    """One decoded frame, with the mask that the user gave at this frame, if any."""

    index: int  # position in the video, from 0
    image: np.ndarray  # uint8 (H, W, 3), RGB
    name: str  # stem of the files written for this frame: "00012", or the image file's own stem
    mask: np.ndarray | None = None  # uint8 (H, W) of object ids given here; 0 = nothing said


@dataclass(slots=True)
class FrameResult:
    """One segmented frame."""

    index: int
    name: str
    image: np.ndarray  # uint8 (H, W, 3), RGB: the frame itself, for drawing
    labels: np.ndarray  # uint8 (H, W), object id of each pixel; 0 = background
    object_ids: tuple[int, ...]  # ids of the objects that have entered so far, ascending
    captions: dict[int, str] | None = None  # id -> what the overlay says of the object
