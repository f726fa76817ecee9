# SPDX-License-Identifier: Apache-2.0
"""What the video instance segmentation systems have in common behind their networks: the tracks of a video, and how masks
that were kept become theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyvseg.layers.transfer import on_gpu
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.spool import Segments
from pyvseg.video.rle import decode_rle, encode_masks

CHUNK_BYTES = 64 << 20  # of full-size logits at a time


@dataclass(frozen=True)
class Track:
    """One track: its score, class (from 0), the class's name where it is known, the object whose masks it has, and in which frames
    (bool (T,), None: wherever the object is)."""

    score: float
    label: int
    category: str
    object_id: int
    segments: Segments
    visible: np.ndarray | None = None

    def __len__(self) -> int:
        """Frames of the video."""
        return self.segments.frames

    def mask(self, frame: int) -> np.ndarray | None:
        """bool (H, W), None where the track is not in the frame."""
        rle = self._at(frame)
        return None if rle is None else decode_rle(rle, self.segments.size, "segment")

    @property
    def rle(self) -> list[dict | None]:
        """COCO RLE per frame, None where the track is not in the frame."""
        return [self._at(t) for t in range(len(self))]

    def _at(self, frame: int) -> dict | None:
        return self.segments.at(self.object_id, frame) if self.visible is None or self.visible[frame] else None

    @property
    def masks(self) -> np.ndarray:
        """bool (T, H, W), all at once; `mask` gives them one by one."""
        empty = np.zeros(self.segments.size, bool)
        return np.stack([empty if (mask := self.mask(t)) is None else mask for t in range(len(self))])


@dataclass
class VideoInstances:
    """N tracks of a video, best first; a sequence of `Track`.

    size      (height, width) of the masks
    scores    (N,) float32
    labels    (N,) int64, classes from 0
    objects   (N,) int64; tracks of one object with several classes share its masks
    segments  COCO RLE of the objects
    classes   names of the classes, where they are known
    visible   (N, T) bool, frames where a track has its object's mask; None: in all
    """

    size: tuple[int, int]
    scores: np.ndarray
    labels: np.ndarray
    objects: np.ndarray
    segments: Segments
    classes: tuple[str, ...] = ()
    visible: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, track: int) -> Track:
        label = int(self.labels[track])
        category = self.classes[label] if label < len(self.classes) else ""
        visible = None if self.visible is None else self.visible[track]
        return Track(float(self.scores[track]), label, category, int(self.objects[track]), self.segments, visible)

    def __iter__(self) -> Iterator[Track]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class Selection:
    """The (object, class) pairs that become tracks, with their class probability; all of shape (N,)."""

    scores: Tensor
    objects: Tensor
    labels: Tensor

    @classmethod
    def best(cls, probabilities: Tensor, top: int, names: list[int] | None = None, *, compat: bool = True) -> Selection:
        """The `top` largest of probabilities (Q, K); `names` are the objects behind the rows, None: 0, 1, ...

        As published an object is in it once for each class that is likely enough; without `compat` only with its likeliest.
        """
        if not compat:
            only = torch.full_like(probabilities, -1.0)
            likeliest = probabilities.argmax(1, keepdim=True) if probabilities.numel() else only.long()
            probabilities, top = only.scatter(1, likeliest, probabilities.gather(1, likeliest)), min(top, len(probabilities))
        scores, index = probabilities.flatten().topk(min(top, probabilities.numel()))
        classes = probabilities.shape[1]
        rows = index // max(classes, 1)
        objects = rows if names is None else torch.tensor(names, dtype=torch.int64, device=rows.device)[rows]
        return cls(scores, objects, index % max(classes, 1))


def render(
    chosen: Selection, frames: int, size: FrameSize, logits_at: Callable[[int, list[int]], tuple[list[int], Tensor]], *,
    quality: Literal["resized", "source"] | None = None, device: torch.device | str = "cpu",
) -> VideoInstances:
    """Full-size masks of the chosen objects, frame by frame, encoded at once.

    logits_at   (frame, objects) -> positions of the objects that are there, and their stride-4 logits (P, h, w)
    quality     scores are multiplied by the mean mask probability inside the mask over all frames, at the size of the resized
                frames (VITA, GenVIS) or of the video's own (CTVIS)
    device      that the masks are made on, with the logits or not
    """
    objects = list(dict.fromkeys(chosen.objects.tolist()))
    segments = Segments(size.source, objects, frames)
    inside, total = torch.zeros(2, len(objects))
    nothing = encode_masks(np.zeros((1, *size.source), bool))[0]["counts"]
    step = max(1, CHUNK_BYTES // (4 * max(size.padded[0] * size.padded[1], size.source[0] * size.source[1])))
    for t in range(frames):
        present, logits = logits_at(t, objects)
        for start in range(0, len(present), step):
            some = present[start : start + step]
            full = size.upsample(logits[None, start : start + step].to(device))
            shown = size.to_source(full)[0]
            if quality is not None:
                judged = full[0] if quality == "resized" else shown
                inside[some] += (judged > 0).flatten(1).sum(1).float().cpu()
                total[some] += (judged.sigmoid() * (judged > 0)).flatten(1).sum(1).cpu()
            masks = shown > 0
            for i, rle in zip(some, encode_masks(masks if on_gpu(masks.device) else masks.numpy())):
                if rle["counts"] != nothing:
                    segments.put(objects[i], t, rle)
    scores = chosen.scores.float().cpu()
    if quality is not None:
        scores = scores * (total / (inside + 1e-6))[[objects.index(name) for name in chosen.objects.tolist()]]
    order = scores.argsort(descending=True, stable=True)
    labels, names = chosen.labels.cpu()[order], chosen.objects.cpu()[order]
    return VideoInstances(size.source, scores[order].numpy(), labels.numpy(), names.numpy(), segments)
