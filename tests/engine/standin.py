# SPDX-License-Identifier: Apache-2.0
"""A model for tests of the engine: clips, a state that matters, and no network."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyvseg.engine.tasks.following import Following
from pyvseg.video.types import Frame, FrameResult


class State:
    """The last label image and a counter that shifts it: a wrong resume gives other masks."""

    def __init__(self, labels=None, shift=0, entered=()):
        self.labels, self.shift, self.entered = labels, shift, set(entered)

    def save(self, path: Path) -> None:
        labels = None if self.labels is None else self.labels.tolist()
        Path(path).write_text(json.dumps([labels, self.shift, sorted(self.entered)]))

    @classmethod
    def load(cls, path: Path) -> "State":
        labels, shift, entered = json.loads(Path(path).read_text())
        return cls(None if labels is None else np.array(labels, np.uint8), shift, entered)


class Shifting:
    """Moves the masks one pixel to the right per clip."""

    def __init__(self, state: State, clip_length: int, delay: float):
        self.state, self.clip_length, self.delay, self.pending = state, clip_length, delay, []

    def step(self, frame: Frame) -> list[FrameResult]:
        self.pending.append(frame)
        if frame.mask is not None or self.state.labels is None or len(self.pending) == self.clip_length:
            return self.finish()
        return []

    def finish(self) -> list[FrameResult]:
        clip, self.pending, state, results = self.pending, [], self.state, []
        time.sleep(self.delay * len(clip))
        for frame in clip:
            if state.labels is None:
                state.labels = np.zeros(frame.image.shape[:2], np.uint8)
            if frame.mask is not None:
                state.labels = np.where(frame.mask, frame.mask, state.labels)
                state.entered |= set(np.unique(frame.mask).tolist()) - {0}
            labels = np.roll(state.labels, state.shift, 1)
            results.append(FrameResult(frame.index, frame.name, frame.image, labels, tuple(sorted(state.entered))))
        state.shift += 1
        return results


def standin(clip_length: int = 5, delay: float = 0.0, **options) -> Following:
    def propagation(saved: Path | None) -> Shifting:
        return Shifting(State.load(saved) if saved else State(), clip_length, delay)

    return Following(propagation, {"model": "standin", "clip_length": clip_length}, clip_length, **options)


@dataclass(frozen=True)
class StandinRecipe:
    """For batches: the stand-in, behind what `Recipe` offers."""

    clip_length: int = 5
    delay: float = 0.0
    at_once: int = 1

    def settings(self) -> dict:
        return {"model": "standin", "clip_length": self.clip_length}

    def task(self) -> Following:
        return standin(self.clip_length, self.delay, at_once=self.at_once)
