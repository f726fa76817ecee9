# SPDX-License-Identifier: Apache-2.0
"""Video object detection: boxes with classes and scores in every frame.

One video: OUT/results.json, OUT/overlay.mp4. Several: OUT/results.json of all, OUT/boxes/VIDEO.json, OUT/overlays/VIDEO.mp4. The JSONs
are COCO results; an image's id is that of the data set, else the frame's number, behind the video's name where there are several.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import gettempdir

from pyvseg.engine.detection import ObjectDetection
from pyvseg.engine.jobs import Job, find_videos
from pyvseg.engine.memory import check_memory
from pyvseg.engine.output import UNFINISHED, Targets
from pyvseg.engine.recipe import Recipe, Results
from pyvseg.engine.task import Found, Lane, Session, opened
from pyvseg.engine.trace import span
from pyvseg.errors import PyvsegError, VideoError
from pyvseg.models.state import load_state, save_state
from pyvseg.models.video_detections import FrameObjects, VideoDetections
from pyvseg.models.video_detector import VideoDetector
from pyvseg.video.box_writer import BoxOverlayWriter, BoxResult, write_boxes
from pyvseg.video.types import Frame
from pyvseg.video.writer import join_tracks


@dataclass(frozen=True)
class Detection:
    """A model that finds objects, and what its results depend on besides the video."""

    network: VideoDetector
    name: str
    classes: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)  # weights, precision, ...: a run is resumed only under equal ones
    results: Results = Results()
    at_once: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> Detection:
        network, common = recipe.load()
        if hasattr(network.settings, "clip_length"):
            network.settings = replace(network.settings, clip_length=common["settings"]["clip_length"])
        elif recipe.clip_length is not None:
            raise PyvsegError(f"--clip-length {recipe.clip_length}: {recipe.model} sees a frame with others of the whole video; leave it out")
        return cls(network, recipe.model, recipe.classes, **common)

    def find(self, source, masks, annotations: str, sequences: list[str] | None) -> Found:
        jobs = find_videos(source, sequences, classes=self.classes, model=self.name, boxes=True)
        return Found(jobs, single=not jobs[0].name)

    def targets(self, out: Path, name: str, single: bool) -> Targets:
        if single:
            return Targets(out, out / UNFINISHED, {"overlay.mp4": out / "overlay.mp4", "boxes.json": out / "results.json"})
        files = {"overlay.mp4": out / "overlays" / f"{name}.mp4", "boxes.json": out / "boxes" / f"{name}.json"}
        return Targets(out, out / UNFINISHED / name, files)

    def lane(self, session: Session, job: Job, targets: Targets) -> DetectionLane:
        return DetectionLane(self, session, job, targets)

    def together(self, lanes: list[DetectionLane]) -> None:
        """Videos share nothing."""

    def written(self, out: Path, targets: list[Targets], single: bool, session: Session) -> list[tuple[str, str]]:
        if not single:
            join_tracks([each.files["boxes.json"] for each in targets], out / "results.json")
        r, found = self.results, session.found
        lines = [("overlay video", f"{out / ('overlay.mp4' if single else 'overlays')}, boxes of score {r.score_threshold} or more")] if r.overlay else []
        of = "" if single else f" of {len(targets)} videos"
        return [*lines, ("COCO results", f"{out / 'results.json'}, {found['boxes']} boxes{of}")]


class DetectionLane(Lane):
    turn = ObjectDetection.frames_per_step

    def __init__(self, task: Detection, session: Session, job: Job, targets: Targets) -> None:
        video = opened(job, session)
        if job.size and job.size != video.size:
            wanted, there = ("x".join(map(str, size[::-1])) for size in (job.size, video.size))
            raise VideoError(f"{video.source}: images are {there}, the annotation file says {wanted}; results would not fit")
        super().__init__(session, job, targets, video, {"model": task.name, **task.settings})
        check_memory(task.network, task.name, video, self.turn)
        self.task, self.detection = task, ObjectDetection(task.network)
        self.found: VideoDetections | None = None

    def begin(self, saved: Path | None) -> None:
        self.detection.state = load_state(saved) if saved else None

    def step(self) -> None:
        with span("model", self.name):
            self.detection.step(self.taken)
            self._check_disk()
            self.done += len(self.taken)
            if self.at_end and not self.session.stop.is_set():
                self.found = self.detection.finish(self.task.classes, top=self.task.results.top_k, stopped=self.session.stop.is_set)

    def _check_disk(self) -> None:
        """After the first frames: raises VideoError where what is kept of all of them will not fit."""
        state = self.detection.state
        if self.done or state is None or not self.video.frame_count:
            return
        bytes_, free = state.kept.nbytes / state.frames * self.video.frame_count, shutil.disk_usage(gettempdir()).free
        if bytes_ > free:
            raise VideoError(
                f"{self.video.source}: {self.video.frame_count} frames take {bytes_ / 1e9:.1f} GB in the temporary folder {gettempdir()}, {free / 1e9:.1f} GB "
                "are free there; let TMPDIR name another, or use fewer --frames"
            )

    def complete(self) -> bool:
        """Writes the results; False if Ctrl-C came in between."""
        found = self.found
        if found is None:
            return False
        with span("write", self.name):
            file = "boxes.json" if self.targets.folder is None else "results.json"
            boxes = write_boxes(self.targets.work / file, found, self._frame_ids(len(found)), self.job.categories or range(1, len(self.task.classes) + 1))
        if self.task.results.overlay and not self._draw(found):
            return False
        self.session.found.update(boxes=boxes)
        return super().complete()

    def _frame_ids(self, count: int) -> list[int | str]:
        first = self.session.part[0] if self.session.part else 0
        if self.job.frame_ids is not None:
            if len(self.job.frame_ids) != count:
                raise VideoError(f"{self.video.source}: {count} frames, but the annotation file has {len(self.job.frame_ids)}")
            return list(self.job.frame_ids)
        numbers = range(first, first + count)
        return list(numbers) if not self.job.name or self.targets.folder is not None else [f"{self.name}/{t}" for t in numbers]

    def _draw(self, found: VideoDetections) -> bool:
        """A second pass over the frames, now that the objects are known."""
        self.output.writers.append(BoxOverlayWriter(self.targets.work / "overlay.mp4", self.video.size, self.video.fps))
        objects = iter(found)
        return self.read_again(lambda frame: _drawn(frame, next(objects), self.task.results.score_threshold))

    def save(self) -> Callable[[Path], None]:
        return partial(save_state, self.detection.state)


def _drawn(frame: Frame, objects: FrameObjects, threshold: float) -> BoxResult:
    shown = [i for i, score in enumerate(objects.scores.tolist()) if score >= threshold]
    texts = [f"{objects.categories[i] or objects.labels[i]} {objects.scores[i]:.2f}" for i in shown]
    return BoxResult(frame.index, frame.name, frame.image, objects.boxes[shown], objects.labels[shown].tolist(), texts)
