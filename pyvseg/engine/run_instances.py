# SPDX-License-Identifier: Apache-2.0
"""Segments the instances of videos and writes the results: `pyvseg run` with a model that needs no masks."""

from __future__ import annotations

import sys
import time
from collections import deque
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
from pyvseg.engine.output import UNFINISHED, Interrupted, Targets, VideoOutput, check_out
from pyvseg.engine.pipeline import Background, Prefetch, stop_on_interrupt
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
        _Run(model, options, summary, stop, resume, frames, categories, progress).run([(job, _targets(out, job.name)) for job in jobs])
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


@dataclass(frozen=True)
class _Run:
    """What all videos of a run have in common."""

    model: InstanceNetwork
    options: InstanceOptions
    summary: InstanceSummary
    stop: Event
    resume: bool
    frames: tuple[int, int | None] | None
    categories: tuple[int | None, ...] | None
    progress: bool

    def run(self, jobs: list[tuple[Job, Targets]]) -> None:
        """Up to `at_once` videos are under way, in the order of the jobs: a resumed run puts the same frames together."""
        waiting, lanes = deque(jobs), []
        with tqdm(total=len(jobs), unit=" videos", leave=False, disable=None if self.progress and len(jobs) > 1 else True) as bar:
            try:
                while waiting or lanes:
                    self._fill(lanes, waiting, bar)
                    advance([lane.segmentation for lane in lanes])
                    self._complete([lane for lane in lanes if lane.at_end], lanes, bar)
                    if self.stop.is_set() and (lanes or waiting):
                        self._suspend(lanes)
            except Interrupted:
                raise
            except BaseException as error:
                for lane in lanes:
                    lane.abandon()
                if isinstance(error, KeyboardInterrupt):  # the second Ctrl-C, in the middle of a clip
                    raise Interrupted("stopped at once; finished videos are kept, the others start again") from None
                raise

    def _fill(self, lanes: list[_Lane], waiting: deque[tuple[Job, Targets]], bar: tqdm) -> None:
        """Every video under way gets its next frames; those that had their last ones make room for others."""
        for lane in lanes:
            lane.fill()
        while not self.stop.is_set():
            self._complete([lane for lane in lanes if not lane.segmentation.pending], lanes, bar)
            if not waiting or len(lanes) == self.options.at_once:
                return
            lane = _Lane(self, *waiting.popleft())
            if lane.finished:
                bar.update()
            else:
                lanes.append(lane)
                lane.open()
                lane.fill()

    def _complete(self, ended: list[_Lane], lanes: list[_Lane], bar: tqdm) -> None:
        for lane in ended:
            if not self.stop.is_set() and lane.complete():
                lanes.remove(lane)
                bar.update()

    def _suspend(self, lanes: list[_Lane]) -> None:
        for lane in lanes:
            lane.suspend()
        where = ", ".join(f"{lane.output.name} after {lane.done} frames" for lane in lanes)
        raise Interrupted(f"stopped {'in ' + where if lanes else 'between two videos'}; the same command with --resume goes on")


class _Lane:
    """One video under way."""

    def __init__(self, run: _Run, job: Job, targets: Targets) -> None:
        self.run, self.job, self.targets = run, job, targets
        self.video = video = open_video(job.video)
        if run.frames:
            self.video = video = video.part(*run.frames)
        if job.size and job.size != video.size:
            wanted, there = ("x".join(map(str, size[::-1])) for size in (job.size, video.size))
            raise VideoError(f"{video.source}: images are {there}, the annotation file says {wanted}; results would not fit")
        o = run.options
        settings = {
            "video": video.source, "frames": list(run.frames or ()), "model": run.model.name, **run.model.settings,
            "score_threshold": o.score_threshold, "top_k": o.top, "compat": o.compat, "at_once": o.at_once,
        }  # fmt: skip
        self.output = VideoOutput(targets, job.name or video.name, settings)
        self.finished = run.resume and self.output.is_finished()
        self.first = self.done = self.output.resume_at() if run.resume else 0  # frames that the state covered at first, and does now
        self.at_end = False

    def open(self) -> None:
        first = self.first
        self.output.open(first)
        state = load_state(self.output.state_path(first), self.run.model.network.device) if first else None
        self.segmentation = InstanceSegmentation(self.run.model.network, state)
        self._bar = _bar(self.video, first, self.run.progress and not self.job.name)
        self._source = Prefetch(self.video, 2 * self.segmentation.frames_per_step)
        self._source.__enter__()
        self._frames = iter(self._source)
        next(islice(self._frames, first, first), None)  # these have been seen

    def fill(self) -> None:
        """Adds the next frames, fewer at the end of the video."""
        wanted = self.segmentation.frames_per_step
        new: list[Frame] = list(islice(self._frames, wanted))
        for frame in new:
            self.segmentation.add(frame)
        self.done += len(new)
        self.run.summary.frames += len(new)
        self.at_end = len(new) < wanted
        self._bar.update(len(new))

    def complete(self) -> bool:
        """Writes the results; False if Ctrl-C came in between."""
        self.close()
        o, classes = self.run.options, self.run.model.classes
        tracks = self.segmentation.finish(o.top, o.compat)
        tracks.classes = classes
        shown = _shown(tracks, o.score_threshold)
        work = self.targets.work
        write_tracks(work / "tracks.json", self.job.id or self.job.name or self.video.name, tracks, self.run.categories)
        if not self._draw(tracks, shown):
            return False
        self.output.finish()
        self.run.summary.tracks += len(tracks)
        self.run.summary.shown += len(shown)
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
        depth = 2 * self.segmentation.frames_per_step
        with Prefetch(self.video, depth) as frames, Background(self.output.write, depth) as sink:
            for frame in frames:
                sink.put(_drawn(frame, tracks, shown))
                if self.run.stop.is_set():
                    return False
        if self.output.written != self.done:
            raise VideoError(f"{self.video.source}: {self.output.written} frames at the second reading, {self.done} at the first; give a file or a list")
        return True

    def suspend(self) -> None:
        """Leaves what a later run needs to go on."""
        self.close()
        self.output.suspend(*(partial(save_state, self.segmentation.state), self.done) if self.done else ())

    def abandon(self) -> None:
        """Removes what is unfinished, except what an earlier run left to go on from."""
        self.close()
        self.output.suspend()
        if not self.first:
            self.output.clean()

    def close(self) -> None:
        if hasattr(self, "_source"):
            self._source.__exit__(None, None, None)
            self._bar.close()


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
