# SPDX-License-Identifier: Apache-2.0
"""The engine's messages, defined on the floor below so that readers and writers share them."""

from pyvseg.errors import VideoError
from pyvseg.video.types import Frame, FrameResult

__all__ = ["Frame", "FrameResult", "check_size"]


def check_size(frame: Frame, size: tuple[int, int]) -> None:
    """Raises VideoError when the frame has another size (H, W) than the video's first."""
    height, width = frame.image.shape[:2]
    if (height, width) != tuple(size):
        raise VideoError(f"frame {frame.name}: size changes from {size[1]}x{size[0]} to {width}x{height}; split the video there or resize it")
