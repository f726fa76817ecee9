# SPDX-License-Identifier: Apache-2.0
"""Segments videos from given masks and writes the results: `pyvseg run`."""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Protocol

import numpy as np
from tqdm import tqdm

from pyvseg.engine.jobs import Job, find_jobs, is_dataset
from pyvseg.engine.output import UNFINISHED, Interrupted, Targets, VideoOutput, check_out, fingerprint
from pyvseg.engine.pipeline import Background, Prefetch, stop_on_interrupt
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
    queue_frames: int = 10,
    progress: bool = True,
) -> Summary:
    """Segments one video, or every sequence of a DAVIS/YouTube-VOS folder, and writes the results under `out`.

    overlay=False leaves the videos out. One video: OUT/masks/FRAME.png, OUT/masks.json, OUT/overlay.mp4.
    Dataset: OUT/Annotations/SEQUENCE/FRAME.png, OUT/rle/SEQUENCE.json, and OUT/overlays/SEQUENCE.mp4.

    video, masks: see `open_video` and `read_masks`; a dataset brings its own masks. frames: (start, stop) of one video,
    counted from 0; masks keep the frame numbers of the whole video. queue_frames bounds the frames that wait between
    two stages. Raises VideoError for bad input (nothing of that video remains), OutputError where results cannot be
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
    with stop_on_interrupt() as stop:
        runner = _Runner(tracker, summary, stop, resume, frames, overlay, queue_frames, progress)
        for done, (job, target) in enumerate(zip(jobs, targets, strict=True)):
            if stop.is_set():
                raise Interrupted(f"stopped after {done} of {len(jobs)} sequences; the same command with --resume goes on")
            runner.run(job, target, f" ({done + 1}/{len(jobs)})" if len(jobs) > 1 else "")
    return summary


def _targets(out: Path, name: str) -> Targets:
    if not name:
        return Targets(out, out / UNFINISHED, {"masks.json": out / "masks.json", "overlay.mp4": out / "overlay.mp4", "masks": out / "masks"})
    files = {"masks.json": out / "rle" / f"{name}.json", "overlay.mp4": out / "overlays" / f"{name}.mp4", "masks": out / "Annotations" / name}
    return Targets(out, out / UNFINISHED / name, files)


@dataclass(frozen=True)
class _Runner:
    """What all videos of a run have in common."""

    tracker: Tracker
    summary: Summary
    stop: Event
    resume: bool
    frames: tuple[int, int | None] | None
    overlay: bool
    queue_frames: int
    progress: bool

    def run(self, job: Job, targets: Targets, position: str) -> None:
        video, given = _open(job, self.frames)
        settings = {"video": video.source, "frames": list(self.frames or ()), "masks": fingerprint(given), **self.tracker.settings}
        output = VideoOutput(targets, video.name, settings)
        if self.resume and output.is_finished():
            return
        first = output.resume_at() if self.resume else 0
        started = time.perf_counter()
        with output.guard(), self._bar(video, first, position) as bar:
            output.open(first)
            output.writers += self._writers(targets.work, video)
            propagation = self.tracker.propagation(output.state_path(first) if first else None)
            reached = self._stream(frames_with_masks(video, given), propagation, output, first, bar)
            self.summary.frames += output.written - first
            self.summary.seconds += time.perf_counter() - started
            if reached is not None:
                output.suspend(*(propagation.state.save, reached) if reached > first else ())
                raise Interrupted(output.how_to_resume())
            _check_masks_used(given, output.written, video)
            output.finish(job.keep)

    def _writers(self, work: Path, video: Video) -> list:
        movie = [OverlayWriter(work / "overlay.mp4", video.size, video.fps)] if self.overlay else []
        return [PngWriter(work / "masks"), RleWriter(work / "masks.json", video.name), *movie]

    def _stream(self, frames: Iterable[Frame], propagation: Propagation, output: VideoOutput, first: int, bar: tqdm) -> int | None:
        """Decode, model and write at the same time, from frame `first`, whose predecessors are there already.

        Returns None at the end of the video; after Ctrl-C the number of frames that the state covers.
        """

        def write(result: FrameResult) -> None:
            output.write(result)
            if result.index >= first:
                bar.update()

        with Prefetch(frames, self.queue_frames) as source, Background(write, self.queue_frames) as sink:
            source = iter(source)
            for result in output.finished_frames(source, first):
                sink.put(result)
                if self.stop.is_set():
                    return first
            for frame in source:
                results = propagation.step(frame)
                for result in results:
                    sink.put(result)
                if results and self.stop.is_set():
                    return results[-1].index + 1
            for result in propagation.finish():
                sink.put(result)
        return None

    def _bar(self, video: Video, done: int, position: str) -> tqdm:
        form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} frames, {rate_noinv_fmt}, {remaining} left"
        disable = None if self.progress else True  # None: shown on terminals only
        return tqdm(total=video.frame_count, initial=done, desc=video.name + position, unit=" frames", bar_format=form, leave=False, disable=disable)


def _open(job: Job, frames: tuple[int, int | None] | None) -> tuple[Video, dict[int, np.ndarray]]:
    """The video and its masks by frame index, both cut to `frames`."""
    video = open_video(job.video)
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
