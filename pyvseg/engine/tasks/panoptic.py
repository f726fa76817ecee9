# SPDX-License-Identifier: Apache-2.0
"""Video panoptic segmentation, written as it comes: OUT/pan_pred/VIDEO/FRAME.png with OUT/pred.json, as VIPSeg's results are,
OUT/step/VIDEO/FRAME.png, as KITTI-STEP's are, and OUT/overlay.mp4 or OUT/overlays/VIDEO.mp4. Models that know no things, for semantic
segmentation, give OUT/semantic/VIDEO/FRAME.png too, as VSPW's results are; models that see depth OUT/depth/VIDEO/FRAME.png, as
Cityscapes-DVPS has it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pyvseg.engine.jobs import Job, find_videos
from pyvseg.engine.memory import fitting_panoptic
from pyvseg.engine.output import UNFINISHED, Targets
from pyvseg.engine.panoptic import PanopticSegmentation
from pyvseg.engine.recipe import Recipe, Results
from pyvseg.engine.task import SHORTER, Found, Lane, Session, opened
from pyvseg.engine.trace import span
from pyvseg.errors import PyvsegError
from pyvseg.models import zoo
from pyvseg.models.state import load_state, save_state
from pyvseg.models.video_kmax import VideoKMaX
from pyvseg.video.depth import read_depth
from pyvseg.video.panoptic import read_ids
from pyvseg.video.panoptic_writer import (
    DepthPngWriter, PanopticClasses, PanopticJsonWriter, PanopticOverlayWriter, PanopticPngWriter, PanopticResult,
    SemanticPngWriter, StepPngWriter, join_panoptic,
)  # fmt: skip
from pyvseg.video.reader import open_video
from pyvseg.video.types import Frame


@dataclass(frozen=True)
class Panoptic:
    """A model that says what every pixel is, and what its results depend on besides the video."""

    network: VideoKMaX
    name: str
    names: tuple[str, ...] = ()  # of the classes
    settings: dict = field(default_factory=dict)  # weights, precision, ...: a run is resumed only under equal ones
    results: Results = Results()
    at_once: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> Panoptic:
        network, common = recipe.load()
        settings = common["settings"]
        if settings["clip_length"] > 1 and not hasattr(network.settings, "clip_length"):
            raise PyvsegError(f"--clip-length {recipe.clip_length}: {recipe.model} takes every frame by itself; leave it out")
        chosen = {name: settings[name] for name in ("clip_length", "compat") if name in settings and hasattr(network.settings, name)}
        network.settings = replace(network.settings, **chosen)
        return cls(network, recipe.model, zoo.variant(recipe.model).classes, **common)

    @property
    def sees_depth(self) -> bool:
        return getattr(self.network, "sees_depth", False)

    @property
    def classes(self) -> PanopticClasses:
        """Raises PyvsegError for names that are not as many as the model's classes."""
        s = self.network.settings
        if self.names and len(self.names) != s.classes:
            raise PyvsegError(f"{self.name}: {len(self.names)} class names for a model of {s.classes} classes; give one name per class")
        names = self.names or tuple(f"class {i}" for i in range(s.classes))
        return PanopticClasses(names, frozenset(s.things), self.network.divisor)

    def find(self, source, masks, annotations: str, sequences: list[str] | None) -> Found:
        jobs = find_videos(source, sequences)
        if jobs[0].name:
            return Found(jobs, False)
        video = open_video(jobs[0].video)
        return Found([replace(jobs[0], name=video.name, video=video)], True)

    def targets(self, out: Path, name: str, single: bool) -> Targets:
        files = {
            "overlay.mp4": out / "overlay.mp4" if single else out / "overlays" / f"{name}.mp4", f"step/{name}": out / "step" / name,
            f"semantic/{name}": out / "semantic" / name, f"depth/{name}": out / "depth" / name,
            f"pan_pred/{name}": out / "pan_pred" / name, "segments.json": out / "segments" / f"{name}.json",
        }  # fmt: skip
        return Targets(out, out / UNFINISHED / name, files)

    def lane(self, session: Session, job: Job, targets: Targets) -> PanopticLane:
        return PanopticLane(self, session, job, targets)

    def together(self, lanes: list[PanopticLane]) -> None:
        """Clips share nothing between videos."""

    def written(self, out: Path, targets: list[Targets], single: bool, session: Session) -> list[tuple[str, str]]:
        join_panoptic([each.files["segments.json"] for each in targets], out / "pred.json", self.classes)
        lines = [("overlay video", str(out / ("overlay.mp4" if single else "overlays")))] if self.results.overlay else []
        lines += [("panoptic PNGs", f"{out / 'pan_pred'}, classes and ids in {out / 'pred.json'}")]
        lines += [("label PNGs", f"{out / 'semantic'}, class + 1")] if not self.classes.things else []
        lines += [("depth PNGs", f"{out / 'depth'}, 256 to a metre")] if self.sees_depth else []
        return lines + ([("STEP PNGs", str(out / "step"))] if self.results.step_pngs else [])


class PanopticLane(Lane):
    def __init__(self, task: Panoptic, session: Session, job: Job, targets: Targets) -> None:
        self.task, self.classes = task, task.classes
        super().__init__(session, job, targets, opened(job, session), {"model": task.name, **task.settings})
        self.network = self._fitting()

    def _fitting(self) -> VideoKMaX:
        """The network, of shorter clips where memory asks for it."""
        network = self.task.network
        wanted = getattr(network.settings, "clip_length", 1)
        length = fitting_panoptic(network, self.task.name, self.video, wanted)
        if length == wanted:
            return network
        self.note = SHORTER.format(length, wanted)
        shorter = copy(network)
        shorter.settings = replace(network.settings, clip_length=length)
        return shorter

    def begin(self, saved: Path | None) -> None:
        work, results, classes = self.targets.work, self.task.results, self.classes
        writers = [PanopticPngWriter(work / "pan_pred" / self.name), PanopticJsonWriter(work / "segments.json", self.name, classes)]
        writers += [StepPngWriter(work / "step" / self.name, classes)] if results.step_pngs else []
        writers += [SemanticPngWriter(work / "semantic" / self.name, classes)] if not classes.things else []
        writers += [DepthPngWriter(work / "depth" / self.name)] if self.task.sees_depth else []
        writers += [PanopticOverlayWriter(work / "overlay.mp4", self.video.size, self.video.fps, classes)] if results.overlay else []
        self.output.writers += writers
        self.segmentation = PanopticSegmentation(self.network, load_state(saved, self.task.network.device) if saved else None)
        self.turn = self.segmentation.frames_per_step

    def again(self, frame: Frame) -> None:
        if frame.index >= self.segmentation.state.written:
            self.segmentation.missing[frame.index] = frame
            return
        values = read_ids(self.targets.work / "pan_pred" / self.name / f"{frame.name}.png")
        present = sorted(set(values.ravel().tolist()) - {0})
        depth = read_depth(self.targets.work / "depth" / self.name / f"{frame.name}.png") if self.task.sees_depth else None
        self.put(PanopticResult(frame.index, frame.name, frame.image, values, tuple(present), depth))

    def step(self) -> None:
        with span("model", self.name):
            results = self.segmentation.step(self.taken, last=self.at_end)
        for result in results:
            self.put(result)
        self.done += len(self.taken)

    def complete(self) -> bool:
        self.drain()
        if not self.output.written:
            raise PyvsegError(f"{self.video.source}: no frames")
        if self.targets.folder is not None:  # a batch has no other file of all its videos
            self.output.writers.append(_Joined(self.targets.work, self.classes))
        return super().complete()

    def save(self) -> Callable[[Path], None]:
        return partial(save_state, self.segmentation.state)


@dataclass
class _Joined:
    """Behind the other writers of a video: makes pred.json of what they have written."""

    work: Path
    classes: PanopticClasses

    def close(self) -> None:
        join_panoptic([self.work / "segments.json"], self.work / "pred.json", self.classes)

    def discard(self) -> None:
        pass
