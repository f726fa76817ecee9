# SPDX-License-Identifier: Apache-2.0
"""Segments the instances of videos and writes the results: `pyvseg run` with a model that needs no masks."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event

import numpy as np
from torch import nn
from tqdm import tqdm

from pyvseg.engine.instances import InstanceSegmentation, advance
from pyvseg.engine.jobs import Job, find_videos
from pyvseg.engine.lanes import drive, raise_error
from pyvseg.engine.memory import check_memory, queue_frames
from pyvseg.engine.output import UNFINISHED, Interrupted, Targets, VideoOutput, check_out
from pyvseg.engine.pipeline import Background, Prefetch, stop_on_interrupt
from pyvseg.engine.trace import span, spans
from pyvseg.engine.types import Frame, FrameResult
from pyvseg.errors import PyvsegError, VideoError
from pyvseg.models.state import load_state, save_state
from pyvseg.models.video_instances import VideoInstances
from pyvseg.video.masks import MAX_OBJECTS
from pyvseg.video.reader import Video, open_video
from pyvseg.video.writer import OverlayWriter, PngWriter, join_tracks, write_tracks


@dataclass(frozen=True)
class InstanceNetwork:
    """A model, and what its results depend on besides the video."""

    network: nn.Module
    name: str
    classes: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)  # weights, precision, ...: a run is resumed only under equal ones


@dataclass(frozen=True)
class InstanceOptions:
    """What is written, and how.

    score_threshold   tracks of at least this score are drawn; results.json has all
    top               tracks of a video, None for the model's own number
    compat            as published: an object may make several tracks, one for each of its likely classes; else only the best
    pngs, overlay     whether to write palette PNGs and overlay videos; without both every video is read once only
    at_once           videos that pass through the network together
    """

    score_threshold: float = 0.3
    top: int | None = None
    compat: bool = True
    pngs: bool = True
    overlay: bool = True
    at_once: int = 1


@dataclass
class InstanceSummary:
    """What a run found and wrote. `frames` and `seconds` count this run only, from decoding to written files."""

    out: Path
    videos: int
    single: bool = True  # one video, not a folder of them
    tracks: int = 0
    shown: int = 0
    frames: int = 0
    seconds: float = 0.0

    @property
    def fps(self) -> float:
        return self.frames / self.seconds if self.seconds else 0.0


def run_instances(
    model: InstanceNetwork,
    source,
    options: InstanceOptions = InstanceOptions(),
    *,
    out: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    frames: tuple[int, int | None] | None = None,
    sequences: list[str] | None = None,
    progress: bool = True,
) -> InstanceSummary:
    """Segments one video or several (`find_videos`) and writes YouTube-VIS results, palette PNGs and overlay videos.

    One video: OUT/results.json, OUT/masks/FRAME.png, OUT/overlay.mp4. Several: OUT/results.json of all, ready for the
    evaluation server of the data set, OUT/tracks/VIDEO.json, OUT/masks/VIDEO/FRAME.png, OUT/overlays/VIDEO.mp4.
    PNGs and overlays show the best track of each object, better ones on top. frames: (start, stop) of one video.

    Raises VideoError for bad input and OutputError where results cannot be written: nothing of the videos under way remains,
    finished ones and states of earlier runs do. After Ctrl-C raises Interrupted; with `resume` the run goes on to the very same results.
    """
    out, started = Path(out), time.perf_counter()
    jobs, dataset = find_videos(source, sequences)
    categories = dataset.category_ids(model.classes, model.name) if dataset else None
    single = not jobs[0].name
    if frames and not single:
        raise PyvsegError(f"{source} holds several videos; --frames is for one")
    check_out(out, overwrite, resume)
    summary = InstanceSummary(out, len(jobs), single)
    with stop_on_interrupt() as stop:
        finding = Finding(model, options, stop, resume, frames, categories, progress and single)
        with tqdm(total=len(jobs), unit=" videos", leave=False, disable=None if progress and not single else True) as bar:

            def ended(job: tuple[Job, Targets], error: Exception | None) -> None:
                raise_error(job, error)
                bar.update()

            try:
                drive([(job, _targets(out, job.name)) for job in jobs], finding.make, finding.together, ended, at_once=options.at_once, stop=stop)
            finally:
                summary.tracks, summary.shown, summary.frames = finding.tracks, finding.shown, finding.frames
    if not single:
        join_tracks([_targets(out, job.name).files["tracks.json"] for job in jobs], out / "results.json")
    summary.seconds = time.perf_counter() - started
    return summary


def _targets(out: Path, name: str) -> Targets:
    if not name:
        files = {"masks": out / "masks", "overlay.mp4": out / "overlay.mp4", "tracks.json": out / "results.json"}
        return Targets(out, out / UNFINISHED, files)
    files = {"masks": out / "masks" / name, "overlay.mp4": out / "overlays" / f"{name}.mp4", "tracks.json": out / "tracks" / f"{name}.json"}
    return Targets(out, out / UNFINISHED / name, files)


@dataclass
class Finding:
    """What the videos of a run have in common; makes their lanes."""

    model: InstanceNetwork
    options: InstanceOptions
    stop: Event
    resume: bool
    part: tuple[int, int | None] | None = None  # of one video, see `run_instances`
    categories: tuple[int | None, ...] | None = None
    progress: bool = False  # a bar for each video
    tracks: int = 0  # of finished videos
    shown: int = 0
    frames: int = 0  # segmented so far

    @property
    def at_once(self) -> int:
        return self.options.at_once

    def make(self, each: tuple[Job, Targets]) -> _Lane | None:
        lane = _Lane(self, *each)
        return None if self.resume and lane.output.is_finished() else lane

    def together(self, lanes: list[_Lane]) -> None:
        with span("model"):
            advance([lane.segmentation for lane in lanes], 1 if lanes[0].alone else self.options.at_once)


class _Lane:
    """One video under way (`pyvseg.engine.lanes.Lane`)."""

    def __init__(self, run: Finding, job: Job, targets: Targets) -> None:
        self.run, self.job, self.targets = run, job, targets
        self.video = video = open_video(job.video)
        if run.part:
            self.video = video = video.part(*run.part)
        if job.size and job.size != video.size:
            wanted, there = ("x".join(map(str, size[::-1])) for size in (job.size, video.size))
            raise VideoError(f"{video.source}: images are {there}, the annotation file says {wanted}; results would not fit")
        o, network = run.options, run.model.network
        self.segmentation = InstanceSegmentation(network)
        step = self.segmentation.frames_per_step
        self.alone, self.note = False, ""
        try:
            check_memory(network, run.model.name, video, step, o.at_once)
        except VideoError:
            if o.at_once == 1:
                raise
            check_memory(network, run.model.name, video, step)
            self.alone, self.note = True, f"segmented by itself: {o.at_once} at once would not fit into memory"
        self._depth = queue_frames(video, step)
        settings = {
            "video": video.source, "frames": list(run.part or ()), "model": run.model.name, **run.model.settings,
            "score_threshold": o.score_threshold, "top_k": o.top, "compat": o.compat, "at_once": o.at_once,
        }  # fmt: skip
        self.output = VideoOutput(targets, job.name or video.name, settings)
        self.first = self.done = self.output.resume_at() if run.resume else 0  # frames that the state covered at first, and does now
        self.found: VideoInstances | None = None
        self.at_end = self.idle = False
        self._threads = ExitStack()

    def open(self) -> None:
        first = self.first
        self.output.open(first)
        state = load_state(self.output.state_path(first), self.run.model.network.device) if first else None
        self.segmentation.state = state
        self._bar = self._threads.enter_context(_bar(self.video, first, self.run.progress))
        decoded = spans("decode", self.video, self.output.name)
        self._frames = iter(self._threads.enter_context(Prefetch(decoded, self._depth)))
        next(islice(self._frames, first, first), None)  # these have been seen

    def fill(self) -> None:
        """Adds the next frames, fewer at the end of the video."""
        wanted = self.segmentation.frames_per_step
        new: list[Frame] = list(islice(self._frames, wanted))
        for frame in new:
            self.segmentation.add(frame)
        self.done += len(new)
        self.run.frames += len(new)
        self.at_end, self.idle = len(new) < wanted, not new
        self._bar.update(len(new))

    def step(self) -> None:
        if self.at_end and not self.run.stop.is_set():
            o = self.run.options
            with span("model", self.output.name):
                self.found = self.segmentation.finish(o.top, o.compat)
            self.found.classes = self.run.model.classes

    def complete(self) -> bool:
        """Writes the results; False if Ctrl-C came in between."""
        tracks = self.found
        if tracks is None:
            return False
        shown = _shown(tracks, self.run.options.score_threshold)
        with span("write", self.output.name):
            file = "tracks.json" if self.targets.folder is None else "results.json"
            name = self.output.name if self.job.id is None else self.job.id
            entries = write_tracks(self.targets.work / file, name, tracks, self.run.categories)
        if not self._draw(tracks, shown):
            return False
        with span("write", self.output.name):
            self.output.finish()
        self._threads.close()
        self.run.tracks += entries
        self.run.shown += len(shown)
        return True

    def _draw(self, tracks: VideoInstances, shown: list[int]) -> bool:
        """A second pass over the frames, now that the tracks are known."""
        o, work = self.run.options, self.targets.work
        if o.pngs:
            self.output.writers.append(PngWriter(work / "masks"))
        if o.overlay:
            self.output.writers.append(OverlayWriter(work / "overlay.mp4", self.video.size, self.video.fps))
        if not self.output.writers:
            return True
        with Prefetch(spans("decode", self.video, self.output.name), self._depth) as frames, Background(self._write, self._depth) as sink:
            for frame in frames:
                sink.put(_drawn(frame, tracks, shown))
                if self.run.stop.is_set():
                    return False
        if self.output.written != self.done:
            raise VideoError(f"{self.video.source}: {self.output.written} frames at the second reading, {self.done} at the first; give a file or a list")
        return True

    def _write(self, result: FrameResult) -> None:
        with span("write", self.output.name):
            self.output.write(result)

    def suspend(self) -> str:
        self._threads.close()
        self.output.suspend(*(partial(save_state, self.segmentation.state), self.done) if self.done else ())
        return f"{self.output.name} after {self.done} frames"

    def abandon(self, error: BaseException) -> BaseException:
        self._threads.close()
        self.output.suspend()
        if not self.first:
            self.output.clean()
        if isinstance(error, KeyboardInterrupt):
            return Interrupted("stopped at once; finished videos are kept, the others start again")
        return error


def _bar(video: Video, done: int, shown: bool) -> tqdm:
    return tqdm(total=video.frame_count, initial=done, desc=video.name, unit=" frames", leave=False, disable=None if shown else True, file=sys.stderr)


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
