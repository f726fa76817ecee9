# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video TransVOD's systems see together, as their published evaluation chooses them."""

from __future__ import annotations

import math
from random import Random

_LATTICE = 16  # references are taken about so many to a video
_FEW = 8  # fewer references than this are chosen otherwise
_SEED = 42


def references(frame: int, frames: int, count: int) -> list[int]:
    """`count` frames to see `frame` with, of a video of so many frames.

    Eight or more lie a sixteenth of the video apart, the earliest first, until they are enough; a video that has too few is gone
    through again. Fewer follow the frame, or precede it where it is late.
    """
    last, step = frames - 1, max(frames // _LATTICE, 1)
    if count < _FEW:
        if frame // step < count:
            return [min(frame + (i + 1) * step, last) for i in range(count)]
        return [max(frame - (i + 1) * step, 0) for i in range(count)]
    left, right = -frame // step, (last - frame) // step
    chosen = [min(max(frame + i * step, 0), last) for i in range(left, right) if i]
    if frame in chosen:
        chosen.remove(frame)
    chosen = chosen or [frame]  # published code would look for ever
    return (chosen * math.ceil(count / len(chosen)))[:count]


def groups(frames: int, length: int, shuffle: bool = True) -> list[list[int]]:
    """Groups of `length` frames that hold every frame at least once: of a short video frames come several times, of others some of the
    last ones twice. Published code shuffles them anew in every run, this does it always alike."""
    order = list(range(frames))
    while len(order) < length:
        order += order
    missing = -len(order) % length
    order += order[len(order) - missing :]
    if shuffle:
        Random(_SEED).shuffle(order)
    return [order[start : start + length] for start in range(0, len(order), length)]
