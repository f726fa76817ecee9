# SPDX-License-Identifier: Apache-2.0
"""Segments videos from given masks and writes the results: `pyvseg run`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Protocol

import numpy as np
from tqdm import tqdm

from pyvseg.engine.jobs import Job, find_jobs, is_dataset
from pyvseg.engine.lanes import drive, raise_error
from pyvseg.engine.memory import queue_frames
from pyvseg.engine.output import UNFINISHED, Targets, VideoOutput, check_out, fingerprint
from pyvseg.engine.pipeline import Background, Prefetch, stop_on_interrupt
from pyvseg.engine.trace import span, spans
from pyvseg.errors import PyvsegError, VideoError
from pyvseg.video.masks import frames_with_masks, read_masks
from pyvseg.video.reader import Video, open_video
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
class Tracker:
    """A model and the settings it runs with."""

    propagation: Callable[[Path | None], Propagation]  # for a new video (None), or continuing from a saved state
    settings: dict  # all that the masks depend on besides video and masks: model, weights, clip length, ...
    clip_length: int = 5  # frames that a video takes at a time
    fit: Callable[[Video, int], int] | None = None  # clip length for a video with so many objects, see `memory.fitting_clip`
    look_ahead: Callable[[list[tuple[Propagation, list[Frame]]], int], None] = lambda videos, room: None  # what videos share: see `propagate.look_ahead`


@dataclass
class Summary:
    """What a run did. `frames` and `seconds` count the frames computed in this run, from decoding to written files."""

    out: Path
    targets: list[Targets]
    frames: int = 0
    seconds: float = 0.0
    note: str = ""

    @property
    def fps(self) -> float:
        return self.frames / self.seconds if self.seconds else 0.0


def run(
    tracker: Tracker,
    video,
    masks=None,
    *,
    out: str | Path,
    overlay: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    frames: tuple[int, int | None] | None = None,
    annotations: str = "auto",
    sequences: list[str] | None = None,
    progress: bool = True,
) -> Summary:
    """Segments one video, or every sequence of a DAVIS/YouTube-VOS folder, and writes the results under `out`.

    overlay=False leaves the videos out. One video: OUT/masks/FRAME.png, OUT/masks.json, OUT/overlay.mp4.
    Dataset: OUT/Annotations/SEQUENCE/FRAME.png, OUT/rle/SEQUENCE.json, and OUT/overlays/SEQUENCE.mp4.

    video, masks: see `open_video` and `read_masks`; a dataset brings its own masks. frames: (start, stop) of one video,
    counted from 0; masks keep the frame numbers of the whole video. Raises VideoError for bad input (nothing of that video remains), OutputError where results cannot be
    written, Interrupted after Ctrl-C.
    """
    out = Path(out)
    if is_dataset(video):
        if masks is not None or frames is not None:
            raise PyvsegError(f"{video} is a dataset folder with its own Annotations; leave --mask and --frames out")
        jobs, note = find_jobs(Path(video), annotations, sequences)
    else:
        if masks is None:
            raise VideoError(f"{video}: labels are missing: say what to follow with --mask FIRST.png (palette PNG, binary PNGs or JSON)")
        jobs, note = [Job("", video, masks)], ""
    targets = [_targets(out, job.name) for job in jobs]
    check_out(out, overwrite, resume)
    summary = Summary(out, targets, note=note)
    if note and progress:
        print(note, file=sys.stderr)
    started = time.perf_counter()
    with stop_on_interrupt() as stop:
        following = Following(tracker, stop, resume, overlay, part=frames, progress=progress, count=len(jobs))
        try:
            drive(zip(jobs, targets, strict=True), following.make, following.together, raise_error, at_once=1, stop=stop)
        finally:
            summary.frames, summary.seconds = following.frames, time.perf_counter() - started
    return summary


def _targets(out: Path, name: str) -> Targets:
    if not name:
        return Targets(out, out / UNFINISHED, {"masks.json": out / "masks.json", "overlay.mp4": out / "overlay.mp4", "masks": out / "masks"})
    files = {"masks.json": out / "rle" / f"{name}.json", "overlay.mp4": out / "overlays" / f"{name}.mp4", "masks": out / "Annotations" / name}
    return Targets(out, out / UNFINISHED / name, files)


@dataclass
class Following:
    """What the videos of a run have in common; makes their lanes."""

    tracker: Tracker
    stop: Event
    resume: bool
    overlay: bool = True
    pngs: bool = True  # without them a stopped video starts again: they are what it would go on from
    part: tuple[int, int | None] | None = None  # of one video, see `run`
    progress: bool = False  # a bar for each video
    count: int = 1  # videos, for the bar
    at_once: int = 1
    frames: int = 0  # computed so far
    begun: int = 0

    def make(self, each: tuple[Job, Targets]) -> Following.Lane | None:
        job, targets = each
        self.begun += 1
        video, given = _open(job, self.part)
        settings = {"video": video.source, "frames": list(self.part or ()), "masks": fingerprint(given), **self.tracker.settings}
        output = VideoOutput(targets, job.name or video.name, settings)
        if self.resume and output.is_finished():
            return None
        return Following.Lane(self, job, video, given, output)

    def together(self, lanes: list[Following.Lane]) -> None:
        if self.at_once > 1:
            with span("model"):
                self.tracker.look_ahead([(lane.propagation, lane.taken) for lane in lanes], self.at_once * self.tracker.clip_length)

    class Lane:
        """One video under way (`pyvseg.engine.lanes.Lane`)."""

        def __init__(self, common: Following, job: Job, video: Video, given: dict[int, np.ndarray], output: VideoOutput) -> None:
            self.common, self.job, self.video, self.given, self.output = common, job, video, given, output
            self.first = self.done = output.resume_at() if common.resume else 0  # frames whose masks were there, and are now
            self.taken: list[Frame] = []
            tracker, objects = common.tracker, len({int(i) for mask in given.values() for i in np.unique(mask)} - {0})
            self.clip_length = tracker.clip_length if tracker.fit is None else tracker.fit(video, objects)
            self.alone, self.note = False, ""
            if self.clip_length < tracker.clip_length:
                self.note = f"clip length {self.clip_length} in place of {tracker.clip_length}, which would not fit into memory"
            self.at_end = self.idle = False
            self._threads = ExitStack()

        def open(self) -> None:
            output, first, tracker = self.output, self.first, self.common.tracker
            output.open(first)
            output.writers += self._writers()
            self.propagation = tracker.propagation(output.state_path(first) if first else None)
            if self.clip_length < tracker.clip_length:
                self.propagation.clip_length = self.clip_length
            depth = queue_frames(self.video, self.clip_length)
            decoded = spans("decode", frames_with_masks(self.video, self.given), self.output.name)
            self._source = iter(self._threads.enter_context(Prefetch(decoded, depth)))
            self._bar = self._threads.enter_context(self._make_bar())
            self._sink = Background(self._write, depth)
            self._sink.__enter__()
            for result in output.finished_frames(self._source, first):
                self._sink.put(result)
                if self.common.stop.is_set():
                    return

        def _writers(self) -> list:
            work, video = self.output.targets.work, self.video
            movie = [OverlayWriter(work / "overlay.mp4", video.size, video.fps)] if self.common.overlay else []
            pngs = [PngWriter(work / "masks")] if self.common.pngs else []
            return [*pngs, RleWriter(work / "masks.json", self.output.name), *movie]

        def fill(self) -> None:
            self.taken = list(islice(self._source, self.clip_length))
            self.at_end, self.idle = len(self.taken) < self.clip_length, not self.taken

        def step(self) -> None:
            with span("model", self.output.name):
                results = [result for frame in self.taken for result in self.propagation.step(frame)]
                results += self.propagation.finish() if self.at_end else []
            for result in results:
                self._sink.put(result)
                self.done = result.index + 1
            self.common.frames += len(results)

        def _write(self, result: FrameResult) -> None:
            with span("write", self.output.name):
                self.output.write(result)
            if result.index >= self.first:
                self._bar.update()

        def complete(self) -> bool:
            self._sink.__exit__(None, None, None)
            _check_masks_used(self.given, self.output.written, self.video)
            with span("write", self.output.name):
                self.output.finish(self.job.keep)
            self._threads.close()
            return True

        def suspend(self) -> str:
            self._close()
            self.output.suspend(*(self.propagation.state.save, self.done) if self.done > self.first and self.common.pngs else ())
            return self.output.how_far()

        def abandon(self, error: BaseException) -> BaseException:
            self._close()
            return self.output.given_up(error)

        def _close(self) -> None:
            if hasattr(self, "_sink"):
                with suppress(Exception):  # told already, or on its way to be
                    self._sink.__exit__(None, None, None)
            self._threads.close()

        def _make_bar(self) -> tqdm:
            form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} frames, {rate_noinv_fmt}, {remaining} left"
            disable = None if self.common.progress else True  # None: shown on terminals only
            where = f" ({self.common.begun}/{self.common.count})" if self.common.count > 1 else ""
            return tqdm(
                total=self.video.frame_count, initial=self.first, desc=self.video.name + where, unit=" frames", bar_format=form, leave=False, disable=disable
            )


def _open(job: Job, frames: tuple[int, int | None] | None) -> tuple[Video, dict[int, np.ndarray]]:
    """The video and its masks by frame index, both cut to `frames`."""
    video = open_video(job.video)
    if job.masks is None:
        raise VideoError(f"{video.source}: no masks given for this video; name them in the list, or put NAME.png, NAME.json or NAME/ into the --masks folder")
    given = read_masks(job.masks, video)
    if frames:
        start, stop = frames
        video = video.part(start, stop)
        given = {index - start: mask for index, mask in given.items() if index >= start and (stop is None or index < stop)}
    if not given:
        raise VideoError(f"{video.source}: no mask inside frames {frames[0]}:{frames[1] or ''}; give one there")
    return video, given


def _check_masks_used(given: dict, frame_count: int, video: Video) -> None:
    late = [index for index in given if index >= frame_count]
    if late:
        raise VideoError(f"{video.source}: there is a mask for frame {late[0]} but only {frame_count} frames (counted from 0)")
