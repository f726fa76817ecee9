# SPDX-License-Identifier: Apache-2.0
"""Panoptic segmentation of videos, written as it comes: `pyvseg run` with a panoptic model."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event

from tqdm import tqdm

from pyvseg.engine.jobs import Job, find_videos
from pyvseg.engine.lanes import drive, raise_error
from pyvseg.engine.memory import queue_frames
from pyvseg.engine.output import UNFINISHED, Interrupted, Targets, VideoOutput, check_out
from pyvseg.engine.panoptic import PanopticSegmentation
from pyvseg.engine.pipeline import Background, Prefetch, stop_on_interrupt
from pyvseg.engine.trace import span, spans
from pyvseg.engine.types import Frame
from pyvseg.errors import PyvsegError
from pyvseg.models.state import load_state, save_state
from pyvseg.models.video_kmax import VideoKMaX
from pyvseg.video.panoptic import read_ids
from pyvseg.video.panoptic_writer import (
    PanopticClasses, PanopticJsonWriter, PanopticOverlayWriter, PanopticPngWriter, PanopticResult, StepPngWriter, join_panoptic,
)  # fmt: skip
from pyvseg.video.reader import open_video


@dataclass(frozen=True)
class PanopticNetwork:
    """A model, and what its results depend on besides the video."""

    network: VideoKMaX
    name: str
    names: tuple[str, ...] = ()  # of the classes
    settings: dict = field(default_factory=dict)  # weights, precision, ...: a run is resumed only under equal ones

    @property
    def classes(self) -> PanopticClasses:
        """Raises PyvsegError for names that are not as many as the model's classes."""
        s = self.network.settings
        if self.names and len(self.names) != s.classes:
            raise PyvsegError(f"{self.name}: {len(self.names)} class names for a model of {s.classes} classes; give one name per class")
        names = self.names or tuple(f"class {i}" for i in range(s.classes))
        return PanopticClasses(names, frozenset(s.things), s.linking.divisor)


@dataclass(frozen=True)
class PanopticOptions:
    """What is written besides: an overlay video; `step`, OUT/step/VIDEO/FRAME.png, as KITTI-STEP's results are."""

    overlay: bool = True
    step: bool = False


@dataclass
class PanopticSummary:
    """What a run wrote. `frames` and `seconds` count this run only, from decoding to written files."""

    out: Path
    videos: int
    single: bool
    frames: int = 0
    seconds: float = 0.0

    @property
    def fps(self) -> float:
        return self.frames / self.seconds if self.seconds else 0.0


def run_panoptic(
    model: PanopticNetwork,
    source,
    options: PanopticOptions = PanopticOptions(),
    *,
    out: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    frames: tuple[int, int | None] | None = None,
    sequences: list[str] | None = None,
    progress: bool = True,
) -> PanopticSummary:
    """Segments one video or several (`find_videos`) and writes OUT/pan_pred/VIDEO/FRAME.png with OUT/pred.json, as VIPSeg's
    results are, and OUT/overlay.mp4 or OUT/overlays/VIDEO.mp4.

    frames: (start, stop) of one video. Raises VideoError for bad input and OutputError where results cannot be written: nothing
    of that video remains. After Ctrl-C raises Interrupted; with `resume` the run goes on to the very same results.
    """
    out, started = Path(out), time.perf_counter()
    jobs, _ = find_videos(source, sequences)
    single = not jobs[0].name
    if frames and not single:
        raise PyvsegError(f"{source} holds several videos; --frames is for one")
    classes = model.classes
    check_out(out, overwrite, resume)
    summary = PanopticSummary(out, len(jobs), single)
    each = [(job, _targets(out, job.name or open_video(job.video).name, single)) for job in jobs]
    with stop_on_interrupt() as stop:
        finding = PanopticFinding(model, options, stop, resume, frames, progress)
        try:
            drive(each, finding.make, finding.together, raise_error, at_once=finding.at_once, stop=stop)
        finally:
            summary.frames, summary.seconds = finding.frames, time.perf_counter() - started
    join_panoptic([targets.files["segments.json"] for _, targets in each], out / "pred.json", classes)
    return summary


def _targets(out: Path, name: str, single: bool) -> Targets:
    files = {
        "overlay.mp4": out / "overlay.mp4" if single else out / "overlays" / f"{name}.mp4", f"step/{name}": out / "step" / name,
        f"pan_pred/{name}": out / "pan_pred" / name, "segments.json": out / "segments" / f"{name}.json",
    }  # fmt: skip
    return Targets(out, out / UNFINISHED / name, files)


@dataclass
class PanopticFinding:
    """What the videos of a run have in common; makes their lanes."""

    model: PanopticNetwork
    options: PanopticOptions
    stop: Event
    resume: bool
    part: tuple[int, int | None] | None = None  # of one video, see `run_panoptic`
    progress: bool = False  # a bar for each video
    at_once: int = 1
    frames: int = 0  # segmented so far

    def make(self, each: tuple[Job, Targets]) -> _Lane | None:
        lane = _Lane(self, *each)
        return None if self.resume and lane.output.is_finished() else lane

    def together(self, lanes: list[_Lane]) -> None:
        """Clips share nothing between videos."""


class _Lane:
    """One video under way (`pyvseg.engine.lanes.Lane`)."""

    def __init__(self, run: PanopticFinding, job: Job, targets: Targets) -> None:
        self.run, self.targets = run, targets
        self.video = open_video(job.video)
        if run.part:
            self.video = self.video.part(*run.part)
        self.name = job.name or self.video.name
        self.classes = run.model.classes
        settings = {"video": self.video.source, "frames": list(run.part or ()), "model": run.model.name, **run.model.settings}
        self.output = VideoOutput(self.targets, self.name, settings)
        self.first = self.done = self.output.resume_at() if run.resume else 0  # frames that the state covered at first, and does now
        self.taken: list[Frame] = []
        self.at_end = self.idle = self.alone = False
        self.note = ""
        self._threads = ExitStack()

    def open(self) -> None:
        first, network = self.first, self.run.model.network
        self.output.open(first)
        self.output.writers += self._writers()
        state = load_state(self.output.state_path(first), network.device) if first else None
        self.segmentation = PanopticSegmentation(network, state)
        depth = queue_frames(self.video, self.segmentation.frames_per_step)
        self._frames = iter(self._threads.enter_context(Prefetch(spans("decode", self.video, self.name), depth)))
        self._bar = self._threads.enter_context(self._make_bar())
        self._sink = Background(self._write, depth)
        self._sink.__enter__()
        for frame in islice(self._frames, first):
            if frame.index >= state.written:
                self.segmentation.missing[frame.index] = frame
            elif not self.run.stop.is_set():
                self._sink.put(self._finished(frame))

    def _writers(self) -> list:
        work, options, classes = self.targets.work, self.run.options, self.classes
        writers = [PanopticPngWriter(work / "pan_pred" / self.name), PanopticJsonWriter(work / "segments.json", self.name, classes)]
        writers += [StepPngWriter(work / "step" / self.name, classes)] if options.step else []
        return writers + ([PanopticOverlayWriter(work / "overlay.mp4", self.video.size, self.video.fps, classes)] if options.overlay else [])

    def _finished(self, frame: Frame) -> PanopticResult:
        """What the suspended run left of the frame."""
        values = read_ids(self.targets.work / "pan_pred" / self.name / f"{frame.name}.png")
        present = sorted(set(values.ravel().tolist()) - {0})
        return PanopticResult(frame.index, frame.name, frame.image, values, tuple(present))

    def fill(self) -> None:
        wanted = self.segmentation.frames_per_step
        self.taken = list(islice(self._frames, wanted))
        self.at_end, self.idle = len(self.taken) < wanted, not self.taken

    def step(self) -> None:
        with span("model", self.name):
            results = self.segmentation.step(self.taken, last=self.at_end)
        for result in results:
            self._sink.put(result)
        self.done += len(self.taken)
        self.run.frames += len(self.taken)

    def _write(self, result: PanopticResult) -> None:
        with span("write", self.name):
            self.output.write(result)
        self._bar.update()

    def complete(self) -> bool:
        self._sink.__exit__(None, None, None)
        if not self.output.written:
            raise PyvsegError(f"{self.video.source}: no frames")
        with span("write", self.name):
            if self.targets.folder is not None:  # a batch has no other file of all its videos
                self.output.writers.append(_Joined(self.targets.work, self.classes))
            self.output.finish()
        self._threads.close()
        return True

    def suspend(self) -> str:
        self._close()
        self.output.suspend(*(partial(save_state, self.segmentation.state), self.done) if self.done > self.first else ())
        return f"{self.name} after {self.output.written} frames"

    def abandon(self, error: BaseException) -> BaseException:
        self._close()
        self.output.suspend()
        if not self.first:
            self.output.clean()
        if isinstance(error, KeyboardInterrupt):
            return Interrupted("stopped at once; finished videos are kept, the others start again")
        return error

    def _close(self) -> None:
        if hasattr(self, "_sink"):
            with suppress(Exception):  # told already, or on its way to be
                self._sink.__exit__(None, None, None)
        self._threads.close()

    def _make_bar(self) -> tqdm:
        disable = None if self.run.progress else True  # None: shown on terminals only
        return tqdm(total=self.video.frame_count, desc=self.name, unit=" frames", leave=False, disable=disable, file=sys.stderr)


@dataclass
class _Joined:
    """Behind the other writers of a video: makes pred.json of what they have written."""

    work: Path
    classes: PanopticClasses

    def close(self) -> None:
        join_panoptic([self.work / "segments.json"], self.work / "pred.json", self.classes)

    def discard(self) -> None:
        pass
