# SPDX-License-Identifier: Apache-2.0
"""Frames in, masks and overlays out."""

from pyvseg.video.masks import frames_with_masks, read_masks
from pyvseg.video.overlay import draw_overlay
from pyvseg.video.png import read_labels, write_labels
from pyvseg.video.reader import Video, open_video
from pyvseg.video.types import Frame, FrameResult

__all__ = ["Frame", "FrameResult", "Video", "draw_overlay", "frames_with_masks", "open_video", "read_labels", "read_masks", "write_labels"]
