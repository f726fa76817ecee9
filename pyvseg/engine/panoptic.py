# SPDX-License-Identifier: Apache-2.0
"""Video panoptic segmentation: frames in, panoptic maps out, in order, as soon as a clip is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from pyvseg.engine.types import Frame, check_size
from pyvseg.errors import VideoError
from pyvseg.models.video_kmax import VideoKMaX, VideoKMaXState
from pyvseg.video.panoptic_writer import PanopticResult

_TOGETHER = 2  # frames that pass through the network at a time


class PanopticSegmentation:
    """Drives a model through one video.

    `state` is all that later results depend on: given to another PanopticSegmentation after a `step` of frames_per_step frames,
    with the frames that have no result yet (`missing`), it goes on to the same results.
    """

    def __init__(self, model: VideoKMaX, state: VideoKMaXState | None = None) -> None:
        self.model, self.state = model, state
        self.frames_per_step = max(_TOGETHER, getattr(model.settings, "clip_length", 1))  # 1: every frame stands alone
        self.missing: dict[int, Frame] = {}

    @torch.inference_mode()
    def step(self, frames: list[Frame], *, last: bool = False) -> list[PanopticResult]:
        """Takes the next frames. Raises VideoError when one has another size than the video's first."""
        encoded = []
        for frame in frames:
            self._check(frame)
            self.missing[frame.index] = frame
        for start in range(0, len(frames), _TOGETHER):
            images = [frame.image for frame in frames[start : start + _TOGETHER]]
            encoded += self.model.encode_frames(images, self.state)
        if self.state is None:
            return []
        results = []
        for found in self.model.step(encoded, self.state, last=last):
            frame = self.missing.pop(found.index)
            segments = tuple(value for value, _, _ in found.segments)
            results.append(PanopticResult(frame.index, frame.name, frame.image, found.values, segments, found.depth))
        return results

    def _check(self, frame: Frame) -> None:
        if self.state is None:
            self.state = self.model.new_state(*frame.image.shape[:2])
        check_size(frame, self.state.size.source)


def segment_frames(model: VideoKMaX, frames: Iterable[Frame]) -> Iterator[PanopticResult]:
    """The results of a whole video, each as soon as its clip is done. Raises VideoError without frames."""
    segmentation, source = PanopticSegmentation(model), iter(frames)
    while new := list(islice(source, segmentation.frames_per_step)):
        yield from segmentation.step(new)
    if segmentation.state is None:
        raise VideoError("the video has no frames")
    yield from segmentation.step([], last=True)
