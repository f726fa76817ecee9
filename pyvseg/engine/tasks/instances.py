# SPDX-License-Identifier: Apache-2.0
"""Video instance segmentation: objects are found, tracked and classified.

One video: OUT/results.json, OUT/masks/FRAME.png, OUT/overlay.mp4. Several: OUT/results.json of all, ready for the evaluation server
of the data set, OUT/tracks/VIDEO.json, OUT/masks/VIDEO/FRAME.png, OUT/overlays/VIDEO.mp4. PNGs and overlays show the best track of
each object, better ones on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from pyvseg.engine.instances import InstanceSegmentation, advance
from pyvseg.engine.jobs import Job, find_videos
from pyvseg.engine.memory import check_memory
from pyvseg.engine.output import UNFINISHED, Targets
from pyvseg.engine.recipe import Recipe, Results
from pyvseg.engine.task import ALONE, Found, Lane, Session, opened
from pyvseg.engine.trace import span
from pyvseg.errors import VideoError
from pyvseg.layers.transfer import aside, on_gpu
from pyvseg.models.state import load_state, save_state
from pyvseg.models.video_instances import VideoInstances
from pyvseg.video.masks import MAX_OBJECTS
from pyvseg.video.types import Frame, FrameResult
from pyvseg.video.writer import OverlayWriter, PngWriter, join_tracks, write_tracks


@dataclass(frozen=True)
class Instances:
    """A model that finds instances, and what its results depend on besides the video."""

    network: nn.Module
    name: str
    classes: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)  # weights, precision, ...: with `results`, a run is resumed only under equal ones
    results: Results = Results()
    at_once: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> Instances:
        network, common = recipe.load()
        return cls(network, recipe.model, recipe.classes, **common)

    def find(self, source, masks, annotations: str, sequences: list[str] | None) -> Found:
        jobs = find_videos(source, sequences, classes=self.classes, model=self.name)
        return Found(jobs, single=not jobs[0].name)

    def targets(self, out: Path, name: str, single: bool) -> Targets:
        if single:
            return Targets(out, out / UNFINISHED, {"masks": out / "masks", "overlay.mp4": out / "overlay.mp4", "tracks.json": out / "results.json"})
        files = {"masks": out / "masks" / name, "overlay.mp4": out / "overlays" / f"{name}.mp4", "tracks.json": out / "tracks" / f"{name}.json"}
        return Targets(out, out / UNFINISHED / name, files)

    def lane(self, session: Session, job: Job, targets: Targets) -> InstanceLane:
        return InstanceLane(self, session, job, targets)

    def together(self, lanes: list[InstanceLane]) -> None:
        with span("model"):
            advance([lane.segmentation for lane in lanes], 1 if lanes[0].alone else self.at_once)

    def written(self, out: Path, targets: list[Targets], single: bool, session: Session) -> list[tuple[str, str]]:
        if not single:
            join_tracks([each.files["tracks.json"] for each in targets], out / "results.json")
        r, found = self.results, session.found
        lines = [("overlay video", str(out / ("overlay.mp4" if single else "overlays")))] if r.overlay else []
        lines += [("palette PNGs", f"{out / 'masks'}, {found['shown']} objects of score {r.score_threshold} or more")] if r.pngs else []
        of = "" if single else f" of {len(targets)} videos"
        return [*lines, ("YouTube-VIS", f"{out / 'results.json'}, {found['tracks']} tracks{of}")]


class InstanceLane(Lane):
    def __init__(self, task: Instances, session: Session, job: Job, targets: Targets) -> None:
        video = opened(job, session)
        if job.size and job.size != video.size:
            wanted, there = ("x".join(map(str, size[::-1])) for size in (job.size, video.size))
            raise VideoError(f"{video.source}: images are {there}, the annotation file says {wanted}; results would not fit")
        made = {"model": task.name, **task.settings, **task.results.tracks(), "at_once": task.at_once}
        super().__init__(session, job, targets, video, made)
        self.task, self.segmentation = task, InstanceSegmentation(task.network)
        self.turn = self.segmentation.frames_per_step
        self._check_memory()
        self.found: VideoInstances | None = None
        self.whole = False  # all frames have been segmented

    def _check_memory(self) -> None:
        network, name, at_once = self.task.network, self.task.name, self.task.at_once
        try:
            check_memory(network, name, self.video, self.turn, at_once)
        except VideoError:
            if at_once == 1:
                raise
            check_memory(network, name, self.video, self.turn)
            self.alone, self.note = True, ALONE.format(at_once)

    def begin(self, saved: Path | None) -> None:
        network = self.task.network
        self.segmentation.state = load_state(saved, "cpu" if network.framewise else network.device) if saved else None

    def fill(self) -> None:
        super().fill()
        for frame in self.taken:
            self.segmentation.add(frame)
        self.done += len(self.taken)

    def step(self) -> None:
        self.whole = self.at_end and not self.session.stop.is_set()
        if self.whole and not on_gpu(self.task.network.device):
            self._finish()

    def _finish(self) -> None:
        r = self.task.results
        with span("model", self.name):
            self.found = self.segmentation.finish(r.top_k, r.compat)
        self.found.classes = self.task.classes

    def complete(self) -> bool:
        """Writes the results; False if Ctrl-C came in between."""
        if not self.whole:
            return False
        if self.found is None:  # a GPU has room for it beside other videos' frames
            with aside(self.task.network.device):
                self._finish()
        tracks = self.found
        shown = _shown(tracks, self.task.results.score_threshold)
        with span("write", self.name):
            file = "tracks.json" if self.targets.folder is None else "results.json"
            name = self.name if self.job.id is None else self.job.id
            entries = write_tracks(self.targets.work / file, name, tracks, self.job.categories)
        if not self._draw(tracks, shown):
            return False
        self.session.found.update(tracks=entries, shown=len(shown))
        return super().complete()

    def _draw(self, tracks: VideoInstances, shown: list[int]) -> bool:
        """A second pass over the frames, now that the tracks are known."""
        r, work = self.task.results, self.targets.work
        self.output.writers += [PngWriter(work / "masks")] if r.pngs else []
        self.output.writers += [OverlayWriter(work / "overlay.mp4", self.video.size, self.video.fps)] if r.overlay else []
        return not self.output.writers or self.read_again(lambda frame: _drawn(frame, tracks, shown))

    def save(self) -> Callable[[Path], None]:
        self.segmentation.settle()
        return partial(save_state, self.segmentation.state)


def _shown(tracks: VideoInstances, threshold: float) -> list[int]:
    """Tracks to draw: the best of every object that is good enough; a label image has room for 254."""
    first = {int(name): i for i, name in reversed(list(enumerate(tracks.objects)))}
    return [i for i in sorted(first.values()) if tracks.scores[i] >= threshold][:MAX_OBJECTS]


def _drawn(frame: Frame, tracks: VideoInstances, shown: list[int]) -> FrameResult:
    labels, captions = np.zeros(frame.image.shape[:2], np.uint8), {}
    for i, track in reversed(list(enumerate((tracks[row] for row in shown), 1))):
        captions[i] = f"{track.category or track.label} {track.score:.2f}"
        mask = track.mask(frame.index)
        if mask is not None:
            labels[mask] = i
    return FrameResult(frame.index, frame.name, frame.image, labels, tuple(range(1, len(shown) + 1)), captions)
