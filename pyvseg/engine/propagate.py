# SPDX-License-Identifier: Apache-2.0
"""Semi-supervised segmentation of one video, clip by clip: frames in, label images out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from pyvseg.engine.trace import span
from pyvseg.engine.types import Frame, FrameResult, check_size
from pyvseg.errors import VideoError
from pyvseg.layers.transfer import Arriving, constant
from pyvseg.models.stcn import STCN, ClipFeatures
from pyvseg.models.vos import DEFAULT_MEMORY_FRAMES, Geometry, VOSState


class Propagation:
    """Carries the user's masks through a video.

    model              a loaded network
    clip_length        frames segmented together, None for the model's own number; longer is faster, shorter follows fast change better
    max_memory_frames  bound on each memory bank, None for none. A full bank drops its oldest frame that was not annotated
    required           indices of the frames to segment, None for all (memory frames of STCN are segmented in any case)
    include_last       the previous clip's last frame is temporary memory even when it is not a memory frame
    state              to continue after the frame that a saved state ends with

    `step` takes frames in order and returns the results that have become ready: none while a clip fills, all of a clip
    when it is full or an annotated frame closes it. `finish` returns the rest; their labels are there after `ready`. Between two calls that returned results
    `state` is complete: saved then, it continues to the same masks.
    """

    def __init__(
        self,
        model: STCN,
        *,
        clip_length: int | None = None,
        max_memory_frames: int | None = DEFAULT_MEMORY_FRAMES,
        required: set[int] | None = None,
        include_last: bool = False,
        state: VOSState | None = None,
    ) -> None:
        clip_length = model.settings.clip_length if clip_length is None else clip_length
        if clip_length < 1 or (max_memory_frames is not None and max_memory_frames < 1):
            raise ValueError(f"clip_length and max_memory_frames must be at least 1, got {clip_length} and {max_memory_frames}")
        self.model, self.clip_length, self.required, self.include_last = model, clip_length, required, include_last
        self.state = model.new_state(max_memory_frames) if state is None else state
        self.geometry: Geometry | None = None
        self.features: dict[int, tuple[ClipFeatures, int]] = {}  # of coming frames, see `look_ahead`: index -> features and the row in them
        self._pending: list[Frame] = []

    @torch.inference_mode()
    def step(self, frame: Frame) -> list[FrameResult]:
        """Raises VideoError when the frame or its mask has another size than the first frame."""
        self.check(frame)
        ids = _ids(frame)
        if not self.state.object_ids and not ids:
            return [self._result(frame, np.zeros(frame.image.shape[:2], np.uint8))]
        if ids:
            return self._annotate(frame, ids)
        if self._wanted(frame.index):
            self._pending.append(frame)
        return self._segment(closed=False) if len(self._pending) == self.clip_length else []

    @torch.inference_mode()
    def finish(self) -> list[FrameResult]:
        return self._segment(closed=True)

    def check(self, frame: Frame) -> None:
        """Raises VideoError when the frame or its mask has another size than the first frame."""
        size = frame.image.shape[:2]
        if self.geometry is None:
            self.geometry = Geometry.of(*size, self.model.settings.short_side)
        check_size(frame, self.geometry.source)
        if frame.mask is not None and frame.mask.shape != size:
            given = "x".join(map(str, frame.mask.shape[::-1]))
            raise VideoError(f"mask of frame {frame.name} is {given}, the video {size[1]}x{size[0]}; resize the mask without smoothing")

    def _wanted(self, index: int) -> bool:
        if self.required is None or index in self.required:
            return True
        s = self.model.settings
        if s.schedule == "clip":
            return False
        return index % s.memory_every == 0 if s.schedule == "modulo" else index - self._last_memory() >= s.memory_every

    def _last_memory(self) -> int:
        return self.state.last_memory

    def _annotate(self, frame: Frame, ids: list[int]) -> list[FrameResult]:
        """Close the running clip with this frame, then enter its masks."""
        results, before, features = [], None, None
        if self.state.object_ids and self._wanted(frame.index):
            self._pending.append(frame)
        last = self._pending[-1:] == [frame]
        if self._pending:
            clip, clip_features, probabilities = self._clip(closed=True)
            results = self._results(clip[:-1] if last else clip, probabilities)
            if last:
                before, features = probabilities[:, -1], _rows(clip_features, -1, None)
        if features is None:
            features = self._encode([frame])
        masks = dict(zip(ids, self.geometry.masks(frame.mask, ids, self.model.device)))
        probabilities = self.model.annotate(features, frame.index, masks, before, self.state)
        return results + self._results([frame], probabilities[:, None])

    def _segment(self, *, closed: bool) -> list[FrameResult]:
        if not self._pending:
            return []
        clip, _, probabilities = self._clip(closed=closed)
        return self._results(clip, probabilities)

    def _clip(self, *, closed: bool) -> tuple[list[Frame], ClipFeatures, Tensor]:
        clip, self._pending = self._pending, []
        features = self._encode(clip)
        with span("associate"):
            probabilities = self.model.segment_clip(features, self.state)
            self.model.link(
                features, [f.index for f in clip], probabilities, self.state,
                clip_length=self.clip_length, closed=closed, include_last=self.include_last,
            )  # fmt: skip
        return clip, features, probabilities

    def _encode(self, frames: list[Frame]) -> ClipFeatures:
        """Features of successive frames, computed here unless `look_ahead` did so."""
        found = [self.features.pop(frame.index, None) for frame in frames]
        if None in found:
            x = self.input(frames)
            with span("encode"):
                return self.model.encode(x)
        (whole, first), (last, _) = found[0], found[-1]
        if whole is last:
            return _rows(whole, first, first + len(frames))
        rows = [vars(_rows(features, row, row + 1)) for features, row in found]
        return ClipFeatures(**{name: None if x is None else torch.cat([row[name] for row in rows]) for name, x in rows[0].items()})

    def input(self, frames: list[Frame]) -> Tensor:
        s = self.model.settings
        with span("preprocess"):
            return self.geometry.frames([f.image for f in frames], s.mean, s.std, self.model.device)

    def _results(self, frames: list[Frame], probabilities: Tensor) -> list[FrameResult]:
        ids = self.state.object_ids[: len(probabilities) - 1]
        # Ties go to the lower id, so the volume is read in ascending order whatever the order of entry.
        order = sorted(range(len(ids)), key=ids.__getitem__)
        place = (0, *(i + 1 for i in order))
        ascending = probabilities if order == list(range(len(ids))) else probabilities[constant(place, probabilities.device, torch.int64)]
        ids = sorted(ids)
        with span("upsample"):
            return [self._result(f, labels, ids) for f, labels in zip(frames, self.geometry.labels(ascending, ids))]

    def _result(self, frame: Frame, labels: np.ndarray | Arriving, ids: list[int] = ()) -> FrameResult:
        return FrameResult(frame.index, frame.name, frame.image, labels, tuple(ids))


def propagate(model: STCN, frames: Iterable[Frame], **options) -> Iterator[FrameResult]:
    """Results of a whole video in frame order, as soon as they are ready; `options` are those of `Propagation`."""
    propagation = Propagation(model, **options)
    for frame in frames:
        yield from map(ready, propagation.step(frame))
    yield from map(ready, propagation.finish())


def ready(result: FrameResult) -> FrameResult:
    """The result with labels that have arrived: from a GPU they come while it works on the next clip."""
    result.labels = result.labels if isinstance(result.labels, np.ndarray) else result.labels.wait().numpy()
    return result


@torch.inference_mode()
def look_ahead(videos: list[tuple[Propagation, list[Frame]]], room: int) -> None:
    """Computes the features of the next frames of several videos of one model; frames of equal size pass through its encoder together.

    Networks may round differently for different batch sizes, so every batch is filled up to `room` frames: then a video's masks
    do not depend on how many others happen to be under way.
    """
    groups: dict[tuple[int, ...], list[tuple[Propagation, list[Frame]]]] = {}
    for video, frames in videos:
        if frames and (video.state.object_ids or any(frame.mask is not None for frame in frames)):
            video.check(frames[0])
            if all(frame.image.shape == frames[0].image.shape for frame in frames):  # else `step` says what is wrong
                groups.setdefault(video.geometry.resized, []).append((video, frames))
    for group in groups.values():
        inputs = [video.input(frames) for video, frames in group]
        spare = room - sum(map(len, inputs))
        inputs.append(inputs[-1][-1:].expand(spare, -1, -1, -1))
        with span("encode"):
            features, row = group[0][0].model.encode(torch.cat(inputs)), 0
        for video, frames in group:
            for frame in frames:
                video.features[frame.index] = features, row
                row += 1


def _ids(frame: Frame) -> list[int]:
    """Object ids of the frame's mask, ascending; a mask without objects says nothing. 255 is void."""
    if frame.mask is None:
        return []
    return [int(i) for i in np.unique(frame.mask) if 0 < i < 255]


def _rows(features: ClipFeatures, start: int, stop: int | None) -> ClipFeatures:
    return ClipFeatures(**{name: None if x is None else x[start:stop] for name, x in vars(features).items()})
