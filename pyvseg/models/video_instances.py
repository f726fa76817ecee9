# SPDX-License-Identifier: Apache-2.0
"""What the video instance segmentation systems have in common behind their networks: masks kept until a video's tracks are
known, and the tracks themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from tempfile import SpooledTemporaryFile
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyvseg.models.frame_size import FrameSize
from pyvseg.video.rle import decode_rle, encode_masks

MEMORY_BYTES = 256 << 20  # of kept tensors that stay in memory; later ones go to a temporary file
_CHUNK_BYTES = 64 << 20  # of full-size logits at a time
_MARGIN = 2  # cells around a mask's set cells that its full-size pixels depend on, see `MaskStore`


class Spool:
    """Float32 arrays kept in order, the first `MEMORY_BYTES` in memory, the others in a temporary file; picklable."""

    def __init__(self) -> None:
        self._file = SpooledTemporaryFile(MEMORY_BYTES)
        self._places: list[tuple[int, tuple[int, ...]]] = []

    def __len__(self) -> int:
        return len(self._places)

    def append(self, tensor: Tensor) -> int:
        """Keeps the tensor; returns its number."""
        start = self._file.seek(0, 2)
        self._file.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
        self._places.append((start, tuple(tensor.shape)))
        return len(self) - 1

    def __getitem__(self, number: int) -> Tensor:
        start, shape = self._places[number]
        self._file.seek(start)
        return torch.from_numpy(np.frombuffer(bytearray(self._file.read(4 * math.prod(shape))), np.float32)).view(shape)

    def __getstate__(self) -> dict:
        self._file.seek(0)
        return {"bytes": self._file.read(), "places": self._places}

    def __setstate__(self, state: dict) -> None:
        self.__init__()
        self._file.write(state["bytes"])
        self._places = state["places"]


@dataclass
class MaskStore:
    """Stride-4 mask logits of a video's objects, only where they can matter: a mask that is nowhere set takes no room.

    A full-size pixel is interpolated from cells at most `_MARGIN` apart, and is set only if one of them is; so the box of
    the set cells with that margin gives the very same masks.
    """

    grid: tuple[int, int] = (0, 0)
    spool: Spool = field(default_factory=Spool)
    places: dict[int, dict[int, tuple[int, int, int]]] = field(default_factory=dict)  # frame -> object -> (number, top, left)

    def put(self, frame: int, logits: Tensor, objects: list[int]) -> None:
        """logits (N, h, w) of `objects` in `frame`; a mask that was there already is replaced."""
        self.grid = tuple(logits.shape[-2:])
        kept = self.places.setdefault(frame, {})
        inside = logits > 0
        rows, columns = inside.any(2).cpu().numpy(), inside.any(1).cpu().numpy()
        for i, name in enumerate(objects):
            kept.pop(name, None)
            if rows[i].any():
                (top, bottom), (left, right) = _span(rows[i]), _span(columns[i])
                kept[name] = (self.spool.append(logits[i, top:bottom, left:right]), top, left)

    def get(self, frame: int, objects: list[int]) -> tuple[list[int], Tensor]:
        """Which of `objects` (their positions) have a mask in `frame`, and the logits (P, h, w) of these."""
        kept = self.places.get(frame, {})
        present = [i for i, name in enumerate(objects) if name in kept]
        logits = torch.full((len(present), *self.grid), -1.0)
        for plane, i in zip(logits, present):
            number, top, left = kept[objects[i]]
            part = self.spool[number]
            plane[top : top + part.shape[0], left : left + part.shape[1]] = part
        return present, logits


def _span(set_lines: np.ndarray) -> tuple[int, int]:
    index = np.flatnonzero(set_lines)
    return max(int(index[0]) - _MARGIN, 0), int(index[-1]) + 1 + _MARGIN


@dataclass
class VideoInstances:
    """N tracks of a video, best first.

    size      (height, width) of the masks
    scores    (N,) float32
    labels    (N,) int64, classes from 0
    objects   (N,) int64; tracks of one object with several classes share its masks
    segments  object -> COCO RLE per frame, None where the mask is empty
    """

    size: tuple[int, int]
    scores: np.ndarray
    labels: np.ndarray
    objects: np.ndarray
    segments: dict[int, list[dict | None]]

    def __len__(self) -> int:
        return len(self.scores)

    def masks(self, track: int) -> np.ndarray:
        """bool (T, H, W)"""
        empty = np.zeros(self.size, bool)
        masks = [self.mask(track, t) for t in range(len(self.segments[int(self.objects[track])]))]
        return np.stack([empty if mask is None else mask for mask in masks])

    def mask(self, track: int, frame: int) -> np.ndarray | None:
        """bool (H, W), None where the track is not in the frame."""
        rle = self.segments[int(self.objects[track])][frame]
        return None if rle is None else decode_rle(rle, self.size, "segment")


@dataclass(frozen=True)
class Selection:
    """The (object, class) pairs that become tracks, with their class probability; all of shape (N,)."""

    scores: Tensor
    objects: Tensor
    labels: Tensor

    @classmethod
    def best(cls, probabilities: Tensor, top: int, names: list[int] | None = None) -> Selection:
        """The `top` largest of probabilities (Q, K); `names` are the objects behind the rows, None: 0, 1, ..."""
        scores, index = probabilities.flatten().topk(min(top, probabilities.numel()))
        classes = probabilities.shape[1]
        rows = index // max(classes, 1)
        objects = rows if names is None else torch.tensor(names, dtype=torch.int64, device=rows.device)[rows]
        return cls(scores, objects, index % max(classes, 1))


def render(
    chosen: Selection, frames: int, size: FrameSize, logits_at: Callable[[int, list[int]], tuple[list[int], Tensor]], *, quality: Literal["resized", "source"] | None = None
) -> VideoInstances:
    """Full-size masks of the chosen objects, frame by frame, encoded at once.

    logits_at   (frame, objects) -> positions of the objects that are there, and their stride-4 logits (P, h, w)
    quality     scores are multiplied by the mean mask probability inside the mask over all frames, at the size of the resized
                frames (VITA, GenVIS) or of the video's own (CTVIS)
    """
    objects = list(dict.fromkeys(chosen.objects.tolist()))
    segments: dict[int, list[dict | None]] = {name: [None] * frames for name in objects}
    inside, total = torch.zeros(2, len(objects))
    step = max(1, _CHUNK_BYTES // (4 * max(size.padded[0] * size.padded[1], size.source[0] * size.source[1])))
    for t in range(frames):
        present, logits = logits_at(t, objects)
        for start in range(0, len(present), step):
            some = present[start : start + step]
            full = size.upsample(logits[None, start : start + step])
            shown = size.to_source(full)[0]
            if quality is not None:
                judged = full[0] if quality == "resized" else shown
                inside[some] += (judged > 0).flatten(1).sum(1).float().cpu()
                total[some] += (judged.sigmoid() * (judged > 0)).flatten(1).sum(1).cpu()
            masks = (shown > 0).cpu().numpy()
            set_somewhere = masks.any((1, 2))
            for i, rle in zip(np.array(some)[set_somewhere], encode_masks(masks[set_somewhere])):
                segments[objects[i]][t] = rle
    scores = chosen.scores.float().cpu()
    if quality is not None:
        scores = scores * (total / (inside + 1e-6))[[objects.index(name) for name in chosen.objects.tolist()]]
    order = scores.argsort(descending=True, stable=True)
    labels, names = chosen.labels.cpu()[order], chosen.objects.cpu()[order]
    return VideoInstances(size.source, scores[order].numpy(), labels.numpy(), names.numpy(), segments)
