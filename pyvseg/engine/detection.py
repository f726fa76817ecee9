# SPDX-License-Identifier: Apache-2.0
"""Video object detection: frames in, boxes out once the video is known. Every frame passes through the network once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch

from pyvseg.engine.trace import span
from pyvseg.engine.types import Frame, check_size
from pyvseg.errors import PyvsegError, VideoError
from pyvseg.layers.graphs import graphed
from pyvseg.models.transvod_single import TransVODSingle
from pyvseg.models.video_detections import FrameObjects, VideoDetections
from pyvseg.models.video_detector import DetectionState, VideoDetector

_TOGETHER = 2  # frames that pass through the network at a time


class ObjectDetection:
    """Drives a model of `pyvseg.models` (TransVOD, ...) through one video.

    `step` takes the next frames, `finish` returns the objects of all of them. `state` is all that they depend on: given to another
    ObjectDetection between two steps it goes on to the same objects.
    """

    frames_per_step = _TOGETHER

    def __init__(self, model: VideoDetector, state: DetectionState | None = None) -> None:
        self.model, self.state = model, state

    @torch.inference_mode()
    def step(self, frames: list[Frame]) -> None:
        """Raises VideoError when a frame has another size than the video's first."""
        s = self.model.settings
        for frame in frames:
            self._check(frame)
        for start in range(0, len(frames), _TOGETHER):
            images = [frame.image for frame in frames[start : start + _TOGETHER]]
            with span("preprocess"):
                x = self.state.size.input(images, s.mean, s.std, self.model.device)
            with span("encode"):
                self.model.link(graphed(self.model.encode, x), self.state)

    @torch.inference_mode()
    def finish(
        self, classes: tuple[str, ...] = (), *, top: int | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> VideoDetections | None:
        """The objects of every frame, `top` of them at most; None once `stopped`, which is asked between two frames. Raises VideoError
        without frames."""
        if self.state is None:
            raise VideoError("the video has no frames")
        found = VideoDetections(self.state.frames, classes)
        with span("associate"):
            for t, objects in self.model.finish(self.state):
                found.put(t, objects, top)
                if stopped():
                    return None
        return found

    def _check(self, frame: Frame) -> None:
        if self.state is None:
            self.state = self.model.new_state(*frame.image.shape[:2])
        check_size(frame, self.state.size.source)


class DetectionStream:
    """Objects of a live video, frame by frame, with a model that looks at single frames. Raises PyvsegError for others."""

    def __init__(self, model: VideoDetector, classes: tuple[str, ...] = ()) -> None:
        if not isinstance(model, TransVODSingle):
            raise PyvsegError(f"this {type(model).__name__} sees a frame with others of the whole video; for a stream take transvod_single_*")
        self.model, self.classes, self.frames = model, classes, 0

    def step(self, image: np.ndarray, *, top: int | None = None) -> FrameObjects:
        """The next frame, uint8 RGB (H, W, 3); `top` boxes at most, None for the published 100."""
        (found,) = detect(self.model, [Frame(self.frames, image, f"{self.frames:05d}")], self.classes, top)
        self.frames += 1
        return replace(found, index=self.frames - 1)


def detect(model: VideoDetector, frames: Iterable[Frame], classes: tuple[str, ...] = (), top: int | None = None) -> VideoDetections:
    """The objects of a whole video."""
    detection, taken = ObjectDetection(model), []
    for frame in frames:
        taken.append(frame)
        if len(taken) == detection.frames_per_step:
            detection.step(taken)
            taken = []
    detection.step(taken)
    return detection.finish(classes, top=top)
