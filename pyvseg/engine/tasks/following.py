# SPDX-License-Identifier: Apache-2.0
"""Semi-supervised segmentation: objects are followed from given masks.

One video: OUT/masks/FRAME.png, OUT/masks.json, OUT/overlay.mp4. A DAVIS or YouTube-VOS folder: OUT/Annotations/SEQUENCE/FRAME.png,
OUT/rle/SEQUENCE.json, OUT/overlays/SEQUENCE.mp4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from pyvseg.engine.jobs import Job, find_jobs, is_dataset
from pyvseg.engine.memory import fitting_clip
from pyvseg.engine.output import UNFINISHED, Targets, fingerprint
from pyvseg.engine.propagate import Propagation as Network
from pyvseg.engine.propagate import look_ahead, ready
from pyvseg.engine.recipe import Recipe, Results
from pyvseg.engine.task import ALONE, SHORTER, Found, Lane, Session, opened
from pyvseg.engine.trace import span
from pyvseg.errors import PyvsegError, VideoError
from pyvseg.models.vos import VOSState
from pyvseg.video.masks import frames_with_masks, read_masks
from pyvseg.video.reader import Video
from pyvseg.video.types import Frame, FrameResult
from pyvseg.video.writer import OverlayWriter, PngWriter, RleWriter


class Propagation(Protocol):
    """What the engine asks of a model (`pyvseg.engine.propagate.Propagation`)."""

    state: object  # has .save(path); complete between two calls of which the first returned results

    def step(self, frame: Frame) -> list[FrameResult]:
        """Takes the next frame; returns the results that have become ready, in order."""

    def finish(self) -> list[FrameResult]:
        """The rest, after the last frame."""


@dataclass(frozen=True)
class Following:
    """A model that follows given masks, and the settings it runs with."""

    propagation: Callable[[Path | None], Propagation]  # for a new video (None), or continuing from a saved state
    settings: dict  # all that the masks depend on besides video, masks and `at_once`: model, weights, clip length, ...
    clip_length: int = 5  # frames that a video takes at a time
    fit: Callable[[Video, int, int], tuple[int, int]] | None = None  # for a video, so many objects and videos at once: see `memory.fitting_clip`
    look_ahead: Callable[[list[tuple[Propagation, list[Frame]]], int], None] = lambda videos, room: None  # what videos share: see `propagate.look_ahead`
    results: Results = Results()
    at_once: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> Following:
        network, common = recipe.load()
        length, memory = common["settings"]["clip_length"], recipe.memory_frames

        def propagation(saved: Path | None) -> Propagation:
            state = VOSState.load(saved, network.device) if saved else None
            return Network(network, clip_length=length, max_memory_frames=memory, state=state)

        fit = lambda video, objects, at_once: fitting_clip(network, video, length, objects, memory or 0, at_once)  # noqa: E731
        return cls(propagation, clip_length=length, fit=fit, look_ahead=look_ahead, **common)

    def find(self, source, masks, annotations: str, sequences: list[str] | None) -> Found:
        if is_dataset(source):
            if masks is not None:
                raise PyvsegError(f"{source} is a dataset folder with its own Annotations; leave --mask out")
            jobs, note = find_jobs(Path(source), annotations, sequences)
            return Found(jobs, False, note)
        if masks is None:
            raise VideoError(f"{source}: labels are missing: say what to follow with --mask FIRST.png (palette PNG, binary PNGs or JSON)")
        return Found([Job("", source, masks)], True)

    def targets(self, out: Path, name: str, single: bool) -> Targets:
        if single:
            return Targets(out, out / UNFINISHED, {"masks.json": out / "masks.json", "overlay.mp4": out / "overlay.mp4", "masks": out / "masks"})
        files = {"masks.json": out / "rle" / f"{name}.json", "overlay.mp4": out / "overlays" / f"{name}.mp4", "masks": out / "Annotations" / name}
        return Targets(out, out / UNFINISHED / name, files)

    def lane(self, session: Session, job: Job, targets: Targets) -> FollowingLane:
        return FollowingLane(self, session, job, targets)

    def together(self, lanes: list[FollowingLane]) -> None:
        if self.at_once > 1 and not lanes[0].alone:
            with span("model"):
                self.look_ahead([(lane.propagation, lane.taken) for lane in lanes], self.at_once * self.clip_length)

    def written(self, out: Path, targets: list[Targets], single: bool, session: Session) -> list[tuple[str, str]]:
        if not single:
            return [(f"{len(targets)} sequences", str(out))]
        names = {"overlay video": "overlay.mp4", "palette PNGs": "masks", "COCO RLE JSON": "masks.json"}
        return [(what, str(out / name)) for what, name in names.items() if (out / name).exists()]


class FollowingLane(Lane):
    def __init__(self, task: Following, session: Session, job: Job, targets: Targets) -> None:
        video, self.given = _open(job, session)
        super().__init__(session, job, targets, video, {"masks": fingerprint(self.given), **task.settings, "at_once": task.at_once})
        self.task = task
        objects = len({int(i) for mask in self.given.values() for i in np.unique(mask)} - {0})
        self.turn, at_once = (task.clip_length, task.at_once) if task.fit is None else task.fit(video, objects, task.at_once)
        self.alone = at_once < task.at_once
        if self.turn < task.clip_length:
            self.note = SHORTER.format(self.turn, task.clip_length)
        elif self.alone:
            self.note = ALONE.format(task.at_once)
        self.lasting = task.results.pngs  # they are what a stopped video goes on from

    def begin(self, saved: Path | None) -> None:
        work, results = self.targets.work, self.task.results
        pngs = [PngWriter(work / "masks")] if results.pngs else []
        movie = [OverlayWriter(work / "overlay.mp4", self.video.size, self.video.fps)] if results.overlay else []
        self.output.writers += [*pngs, RleWriter(work / "masks.json", self.name), *movie]
        self.propagation = self.task.propagation(saved)
        if self.turn < self.task.clip_length:
            self.propagation.clip_length = self.turn
        self._entered: set[int] = set()

    def frames(self) -> Iterable[Frame]:
        return frames_with_masks(self.video, self.given)

    def again(self, frame: Frame) -> None:
        if frame.mask is not None:
            self._entered |= set(np.unique(frame.mask).tolist()) - {0}
        labels = self.output.written_labels(frame.name)
        self.put(FrameResult(frame.index, frame.name, frame.image, labels, tuple(sorted(self._entered))))

    def step(self) -> None:
        with span("model", self.name):
            results = [result for frame in self.taken for result in self.propagation.step(frame)]
            results += self.propagation.finish() if self.at_end else []
        for result in results:
            self.put(result)
            self.done = result.index + 1

    def _write(self, result: FrameResult) -> None:
        super()._write(ready(result))

    def complete(self) -> bool:
        self.drain()
        late = [index for index in self.given if index >= self.output.written]
        if late:
            raise VideoError(f"{self.video.source}: there is a mask for frame {late[0]} but only {self.output.written} frames (counted from 0)")
        return super().complete()

    def save(self) -> Callable[[Path], None]:
        return self.propagation.state.save


def _open(job: Job, session: Session) -> tuple[Video, dict[int, np.ndarray]]:
    """The video and its masks by frame index, both cut to the session's part."""
    video, part = opened(job, replace(session, part=None)), session.part
    if job.masks is None:
        raise VideoError(f"{video.source}: no masks given for this video; name them in the list, or put NAME.png, NAME.json or NAME/ into the --masks folder")
    given = read_masks(job.masks, video)
    if part:
        start, stop = part
        video = video.part(start, stop)
        given = {index - start: mask for index, mask in given.items() if index >= start and (stop is None or index < stop)}
    if not given:
        raise VideoError(f"{video.source}: no mask inside frames {part[0]}:{part[1] or ''}; give one there")
    return video, given
