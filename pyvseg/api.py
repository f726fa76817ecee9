# SPDX-License-Identifier: Apache-2.0
"""What `import pyvseg` offers: load a model; track objects through a video or a live stream, or find them by their class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import nn

from pyvseg.engine.detection import DetectionStream, detect
from pyvseg.engine.instances import InstanceStream, segment
from pyvseg.engine.panoptic import PanopticSegmentation, segment_frames
from pyvseg.engine.propagate import Propagation, propagate, ready
from pyvseg.engine.types import Frame, FrameResult
from pyvseg.models import zoo
from pyvseg.models.stcn import STCN
from pyvseg.models.video_detections import VideoDetections
from pyvseg.models.video_instances import VideoInstances
from pyvseg.models.vos import DEFAULT_MEMORY_FRAMES
from pyvseg.video import frames_with_masks, open_video, read_masks
from pyvseg.video.panoptic_writer import PanopticResult


class Model:
    """A loaded model; `network` is the torch module."""

    def __init__(self, network: STCN) -> None:
        self.network = network

    def track(
        self,
        video: str | Path | Iterable[np.ndarray],
        masks: str | Path | np.ndarray | Mapping[int, np.ndarray],
        *,
        clip_length: int | None = None,
        max_memory_frames: int | None = DEFAULT_MEMORY_FRAMES,
    ) -> Iterator[FrameResult]:
        """Follow the masked objects through the video; one result per frame, in order, as soon as it is ready.

        video              a video file, a folder of images, or uint8 RGB arrays (H, W, 3)
        masks              for frame 0: a palette PNG, a JSON of polygons, boxes or RLE, or a label image uint8 (H, W);
                           or {frame index: label image}, which lets objects enter later
        clip_length        frames segmented together, None for the model's own number: longer is faster
        max_memory_frames  bound on the memory, None for the published behaviour (grows with the video)

        Raises VideoError for a video or masks that cannot be used.
        """
        opened = open_video(video)
        frames = frames_with_masks(opened, read_masks(masks, opened))
        return propagate(self.network, frames, clip_length=clip_length, max_memory_frames=max_memory_frames)

    def stream(self, *, max_memory_frames: int | None = DEFAULT_MEMORY_FRAMES) -> Stream:
        """For a camera: the result of each frame as it comes, the same as `track` gives with clip_length=1."""
        return Stream(Propagation(self.network, clip_length=1, max_memory_frames=max_memory_frames))


class Stream:
    """A running propagation that is fed by hand."""

    def __init__(self, propagation: Propagation) -> None:
        self.propagation, self.frames = propagation, 0

    def step(self, image: np.ndarray, mask: np.ndarray | None = None) -> FrameResult:
        """Segment the next frame, uint8 RGB (H, W, 3); `mask`, uint8 (H, W), enters objects or corrects them at this frame.

        Raises VideoError when the frame or its mask has another size than the first frame.
        """
        (result,) = self.propagation.step(Frame(self.frames, image, f"{self.frames:05d}", mask))
        self.frames += 1
        return ready(result)


class InstanceModel:
    """A loaded model for video instance segmentation; `network` is the torch module, `classes` are the names that it knows."""

    def __init__(self, network: nn.Module, classes: tuple[str, ...] = ()) -> None:
        self.network, self.classes = network, classes

    def segment(self, video: str | Path | Iterable[np.ndarray], *, top: int | None = None, compat: bool = True) -> VideoInstances:
        """Find and follow the objects of a video: a sequence of tracks with scores, classes and masks, best first.

        video   a video file, a folder of images, or uint8 RGB arrays (H, W, 3)
        top     so many tracks at most, None for the model's published number
        compat  as published, an object makes a track for each class that it is likely to be; False: only for the likeliest

        Raises VideoError for a video that cannot be used.
        """
        found = segment(self.network, open_video(video), top, compat)
        found.classes = self.classes
        return found

    def stream(self, *, score_threshold: float = 0.3) -> InstanceStream:
        """For a camera: the objects of each frame as it comes, with scores and classes as the video so far has them.

        Raises PyvsegError for models that answer later: VITA, Mask2Former for video, semi-online GenVIS.
        """
        return InstanceStream(self.network, self.classes, score_threshold)


class PanopticModel:
    """A loaded model for video panoptic or semantic segmentation; `network` is the torch module, `classes` are the names that it knows."""

    def __init__(self, network: nn.Module, classes: tuple[str, ...] = ()) -> None:
        self.network, self.classes = network, classes

    def segment(self, video: str | Path | Iterable[np.ndarray]) -> Iterator[PanopticResult]:
        """Every pixel's class and object; one result per frame, in order, as soon as its clip is done.

        video   a video file, a folder of images, or uint8 RGB arrays (H, W, 3)

        Memory does not depend on the video's length. Raises VideoError for a video that cannot be used.
        """
        return segment_frames(self.network, open_video(video))

    def stream(self) -> PanopticSegmentation:
        """For a camera: `step([frame])` returns the results that are complete, with clips of one frame (`*_online`) that frame's own."""
        return PanopticSegmentation(self.network)


class DetectionModel:
    """A loaded model for video object detection; `network` is the torch module, `classes` are the names that it knows."""

    def __init__(self, network: nn.Module, classes: tuple[str, ...] = ()) -> None:
        self.network, self.classes = network, classes

    def detect(self, video: str | Path | Iterable[np.ndarray], *, top: int | None = None) -> VideoDetections:
        """The objects of every frame: a sequence of boxes with scores and classes, best first, one entry for each frame.

        video   a video file, a folder of images, or uint8 RGB arrays (H, W, 3)
        top     so many boxes in a frame at most, None for the published 100

        A frame is seen with others of the whole video, so there is nothing before its end. Raises VideoError for a video that cannot be
        used, OutputError where the temporary folder is full.
        """
        return detect(self.network, open_video(video), self.classes, top)

    def stream(self) -> DetectionStream:
        """For a camera: the objects of each frame as it comes. Raises PyvsegError for models that see frames together."""
        return DetectionStream(self.network, self.classes)


def load(
    name: str = "pcvos_tiny", *, weights: str | Path | None = None, device: str | None = None, precision: str = "float32"
) -> Model | InstanceModel | PanopticModel | DetectionModel:
    """A named model (`pyvseg models` lists them), ready to run; see `pyvseg.models.zoo.load` for the arguments."""
    chosen = zoo.variant(name)
    network = zoo.load(name, weights=weights, device=device, precision=precision)
    if chosen.task == "video instance segmentation":
        return InstanceModel(network, chosen.classes)
    if chosen.task in ("video panoptic segmentation", "video semantic segmentation"):
        return PanopticModel(network, chosen.classes)
    if chosen.task == "video object detection":
        return DetectionModel(network, chosen.classes)
    return Model(network)
