# SPDX-License-Identifier: Apache-2.0
"""Video instance segmentation: frames of one or several videos in, tracks out; or the instances of each frame as it comes."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pyvseg.engine.trace import span
from pyvseg.engine.types import Frame, check_size
from pyvseg.errors import PyvsegError, VideoError
from pyvseg.layers.graphs import graphed
from pyvseg.layers.transfer import Arriving, arrived, from_device, on_gpu
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.video_instances import Selection, VideoInstances

_TOGETHER = 4  # frames of a video that pass through the network at a time


class InstanceSegmentation:
    """Drives a model of `pyvseg.models` (MinVIS, CTVIS, ...) through one video.

    `add` takes the frames in order, `advance` segments what has been added, `finish` returns the tracks. `state` is all that
    they depend on after `settle`: given to another InstanceSegmentation between two steps it goes on to the same tracks.
    frames_per_step is the number of frames that should be added before every `advance`, a multiple of the model's clips.
    """

    def __init__(self, model: nn.Module, state: Any = None) -> None:
        self.model, self.state = model, state
        self.clip_length = getattr(model.settings, "clip_length", None)  # None: frames are segmented one by one in any case
        self.frames_per_step = max(_TOGETHER // (self.clip_length or 1), 1) * (self.clip_length or 1)
        self.pending: list[np.ndarray] = []
        self._linker = ThreadPoolExecutor(1, "pyvseg-link") if model.framewise and on_gpu(model.device) else None
        self._linked: Future | None = None

    def add(self, frame: Frame) -> None:
        """Raises VideoError when the frame has another size than the first frame."""
        s, shape = self.model.settings, frame.image.shape[:2]
        if self.state is None:
            self.state = self.model.new_state(FrameSize.of(*shape, s.short_side, s.long_side))
        check_size(frame, self.state.size.source)
        self.pending.append(frame.image)

    def step(self, frame: Frame) -> None:
        """`add`, and `advance` as often as it is due: all that a single video needs."""
        self.add(frame)
        if len(self.pending) == self.frames_per_step:
            advance([self])

    def input(self) -> Tensor:
        """The added frames as the network takes them."""
        s = self.model.settings
        with span("preprocess"):
            return self.state.size.input(self.pending, s.mean, s.std, self.model.device)

    def take(self, features: Any) -> None:
        """`per_frame` of the added frames: segments and links them clip by clip. Those of a GPU are linked in a thread, while the
        next ones pass through the network."""
        frames, self.pending = len(self.pending), []
        if self.model.framewise:
            on_the_way = tree_map_only(Tensor, from_device, features)
            self.settle()
            if self._linker is None:
                self._link(on_the_way)
            else:
                self._linked = self._linker.submit(self._link, on_the_way)
            return
        step = self.clip_length or frames
        for start in range(0, frames, step):
            with span("associate"):
                clip = self.model.segment_clip(_rows(features, start, start + step), self.state)
                self.model.link(clip, self.state)

    @torch.inference_mode()
    def _link(self, on_the_way: Any) -> None:
        clip = tree_map_only(Arriving, arrived, on_the_way)
        with span("associate"):
            self.model.link(clip, self.state)

    def settle(self) -> None:
        """Waits until what has been segmented is linked; `state` is complete then."""
        linked, self._linked = self._linked, None
        if linked is not None:
            linked.result()

    @torch.inference_mode()
    def finish(self, top: int | None = None, compat: bool = True) -> VideoInstances:
        """The tracks, best first; `top` of them, None for the model's own number. Raises VideoError without frames."""
        if self.state is None:
            raise VideoError("the video has no frames")
        advance([self])
        self.settle()
        return self.model.finish(self.state, top, compat)


@torch.inference_mode()
def advance(videos: list[InstanceSegmentation], at_once: int = 1) -> None:
    """Segments the added frames of videos of one model; frames of equal size pass through its encoder together.

    Networks round differently for different batch sizes. With `at_once` above 1 every batch is filled up to the frames of so
    many videos, so that a video's result does not depend on how many others happen to be under way.
    """
    groups: dict[tuple[int, int], list[InstanceSegmentation]] = {}
    for video in videos:
        if video.pending:
            groups.setdefault(video.state.size.padded, []).append(video)
    for group in groups.values():
        counts = [len(video.pending) for video in group]
        inputs = [video.input() for video in group]
        if at_once > 1:
            spare = at_once * group[0].frames_per_step - sum(counts)
            inputs.append(inputs[-1][-1:].expand(spare, -1, -1, -1))
        with span("encode"):
            features = graphed(group[0].model.per_frame, torch.cat(inputs) if len(inputs) > 1 else inputs[0])
        for video, count, end in zip(group, counts, np.cumsum(counts).tolist()):
            video.take(_rows(features, end - count, end))


def segment(model: nn.Module, frames: Iterable[Frame], top: int | None = None, compat: bool = True) -> VideoInstances:
    """The tracks of a whole video."""
    segmentation = InstanceSegmentation(model)
    for frame in frames:
        segmentation.step(frame)
    return segmentation.finish(top, compat)


@dataclass
class FrameInstances:
    """N objects in a frame, best first.

    object_ids, scores, labels   lists of N: an object keeps its id; score and class (from 0) are those of the video so far
    categories                   names of the classes, where they are known
    masks                        bool (N, H, W)
    """

    index: int
    object_ids: list[int]
    scores: list[float]
    labels: list[int]
    categories: list[str]
    masks: np.ndarray


class InstanceStream:
    """Instances of a live video, frame by frame, with a model that works online: MinVIS, CTVIS, GenVIS of clips of one frame.

    Memory is bounded however long the stream runs. Objects of a lower score than `score_threshold` are left out.
    Raises PyvsegError for models that answer later.
    """

    def __init__(self, model: nn.Module, classes: tuple[str, ...] = (), score_threshold: float = 0.3) -> None:
        clip_length = getattr(model.settings, "clip_length", 1)
        if not hasattr(model, "forget") or clip_length != 1:
            when = f"answers every {clip_length} frames" if clip_length != 1 else "needs the whole video before it answers"
            raise PyvsegError(f"this {type(model).__name__} {when}; for a stream take MinVIS, CTVIS or GenVIS online")
        self.segmentation = InstanceSegmentation(model)
        self.classes, self.score_threshold, self.frames = classes, score_threshold, 0

    @torch.inference_mode()
    def step(self, image: np.ndarray) -> FrameInstances:
        """The next frame, uint8 RGB (H, W, 3). Raises VideoError when it has another size than the first."""
        self.segmentation.add(Frame(self.frames, image, f"{self.frames:05d}"))
        advance([self.segmentation])
        self.segmentation.settle()
        model, state = self.segmentation.model, self.segmentation.state
        probabilities, names = model.probabilities(state)
        best = Selection.best(probabilities, len(names), names, compat=False)
        rows = [i for i, score in enumerate(best.scores.tolist()) if score >= self.score_threshold]
        objects = best.objects[rows].tolist()
        present, logits = state.masks.get(0, objects)
        masks = [state.size.to_source(state.size.upsample(plane[None, None]))[0, 0] > 0 for plane in logits.to(model.device)]
        shown = [(rows[i], mask) for i, mask in zip(present, (mask.cpu().numpy() for mask in masks)) if mask.any()]
        model.forget(state)
        self.frames += 1
        labels = [int(best.labels[row]) for row, _ in shown]
        categories = [self.classes[label] if label < len(self.classes) else "" for label in labels]
        full = np.stack([mask for _, mask in shown]) if shown else np.zeros((0, *state.size.source), bool)
        scores = [float(best.scores[row]) for row, _ in shown]
        return FrameInstances(self.frames - 1, [int(best.objects[row]) for row, _ in shown], scores, labels, categories, full)


def _rows(features: Any, start: int, stop: int) -> Any:
    """Frames `start` to `stop` - 1 of what a model's `encode` returns: a named tuple of tensors and of lists of tensors."""
    return type(features)(*([t[start:stop] for t in part] if isinstance(part, list) else part[start:stop] for part in features))
