# SPDX-License-Identifier: Apache-2.0
"""The engine's messages, defined on the floor below so that readers and writers share them."""

from pyvseg.video.types import Frame, FrameResult

__all__ = ["Frame", "FrameResult"]
