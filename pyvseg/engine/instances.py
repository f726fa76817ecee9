# SPDX-License-Identifier: Apache-2.0
"""Video instance segmentation of one video: frames in, tracks out, and what is written of them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from pyvseg.engine.output import UNFINISHED
from pyvseg.engine.pipeline import Prefetch
from pyvseg.engine.types import Frame, FrameResult
from pyvseg.errors import OutputError, VideoError
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.video_instances import VideoInstances
from pyvseg.video.masks import MAX_OBJECTS
from pyvseg.video.reader import Video, open_video
from pyvseg.video.writer import OverlayWriter, PngWriter, output_errors, write_tracks

_TOGETHER = 4  # frames that pass through the network at a time


class InstanceSegmentation:
    """Drives a model of `pyvseg.models` (MinVIS, CTVIS, ...) through one video.

    `step` takes the frames in order, `finish` returns the tracks. `state` is all that they depend on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.clip_length = getattr(model.settings, "clip_length", _TOGETHER)
        self.size: FrameSize | None = None
        self.state = None
        self._pending: list[np.ndarray] = []

    @torch.inference_mode()
    def step(self, frame: Frame) -> None:
        """Raises VideoError when the frame has another size than the first frame."""
        s, shape = self.model.settings, frame.image.shape[:2]
        if self.size is None:
            self.size = FrameSize.of(*shape, s.short_side, s.long_side)
            self.state = self.model.new_state(self.size)
        if shape != self.size.source:
            before = "x".join(map(str, self.size.source[::-1]))
            raise VideoError(f"frame {frame.name}: size changes from {before} to {shape[1]}x{shape[0]}; split the video there or resize it")
        self._pending.append(frame.image)
        if len(self._pending) == self.clip_length:
            self._segment()

    @torch.inference_mode()
    def finish(self, top: int | None = None) -> VideoInstances:
        """The tracks, best first; `top` of them, None for the model's own number. Raises VideoError without frames."""
        if self.state is None:
            raise VideoError("the video has no frames")
        if self._pending:
            self._segment()
        return self.model.finish(self.state, **({} if top is None else {"top": top}))

    def _segment(self) -> None:
        s = self.model.settings
        images, self._pending = np.stack(self._pending), []
        features = self.model.encode(self.size.input(images, s.mean, s.std, self.model.device))
        self.model.link(self.model.segment_clip(features, self.state), self.state)


def segment(model: nn.Module, frames: Iterable[Frame], top: int | None = None) -> VideoInstances:
    """The tracks of a whole video."""
    segmentation = InstanceSegmentation(model)
    for frame in frames:
        segmentation.step(frame)
    return segmentation.finish(top)


@dataclass
class InstanceSummary:
    """What a run found and wrote. `seconds` from decoding to written files."""

    out: Path
    tracks: VideoInstances
    shown: int
    frames: int
    seconds: float


def run_instances(
    model: nn.Module,
    source,
    *,
    out: str | Path,
    classes: tuple[str, ...] = (),
    score_threshold: float = 0.3,
    top: int | None = None,
    overlay: bool = True,
    overwrite: bool = False,
    frames: tuple[int, int | None] | None = None,
    progress: bool = True,
) -> InstanceSummary:
    """Segments one video and writes OUT/results.json (YouTube-VIS, every track), OUT/masks (palette PNGs) and OUT/overlay.mp4.

    PNGs and overlay show tracks of at least `score_threshold`, the best one of each object, better ones on top.
    Raises VideoError for bad input, OutputError where results cannot be written; either leaves nothing behind.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; choose another --out folder")
    if not overwrite and out.exists() and any(out.iterdir()):
        raise OutputError(f"{out} already holds results or other files; choose another --out, or replace them with --overwrite")
    video = open_video(source)
    video = video.part(*frames) if frames else video
    started = time.perf_counter()
    segmentation = InstanceSegmentation(model)
    with Prefetch(video, 2 * segmentation.clip_length) as decoded, _bar(video, progress) as bar:
        for frame in decoded:
            segmentation.step(frame)
            bar.update()
    tracks = segmentation.finish(top)
    shown = _shown(tracks, score_threshold)
    work = out / UNFINISHED
    try:
        with output_errors(work):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        write_tracks(work / "results.json", video.name, tracks)
        count = _draw(video, tracks, shown, classes, work, overlay)
        _publish(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return InstanceSummary(out, tracks, len(shown), count, time.perf_counter() - started)


def _bar(video: Video, progress: bool) -> tqdm:
    return tqdm(total=video.frame_count, desc=video.name, unit=" frames", leave=False, disable=None if progress else True)


def _shown(tracks: VideoInstances, threshold: float) -> list[int]:
    """Tracks to draw: the best of every object that is good enough; a label image has room for 254."""
    first = {int(name): i for i, name in reversed(list(enumerate(tracks.objects)))}
    return [i for i in sorted(first.values()) if tracks.scores[i] >= threshold][:MAX_OBJECTS]


def _draw(video: Video, tracks: VideoInstances, shown: list[int], classes: tuple[str, ...], work: Path, overlay: bool) -> int:
    """Second pass over the frames, now that the tracks are known."""
    writers = [PngWriter(work / "masks"), *([OverlayWriter(work / "overlay.mp4", video.size, video.fps)] if overlay else [])]
    ids = tuple(range(1, len(shown) + 1))
    captions = {i: _caption(tracks, track, classes) for i, track in zip(ids, shown)}
    count = 0
    try:
        for frame in video:
            labels = np.zeros(video.size, np.uint8)
            for i, track in reversed(list(zip(ids, shown))):
                mask = tracks[track].mask(frame.index)
                if mask is not None:
                    labels[mask] = i
            for writer in writers:
                writer.write(FrameResult(frame.index, frame.name, frame.image, labels, ids, captions))
            count += 1
        for writer in writers:
            writer.close()
    except BaseException:
        for writer in writers:
            writer.discard()
        raise
    return count


def _caption(tracks: VideoInstances, track: int, classes: tuple[str, ...]) -> str:
    label = int(tracks.labels[track])
    return f"{classes[label] if label < len(classes) else label} {tracks.scores[track]:.2f}"


def _publish(work: Path, out: Path) -> None:
    """Results get their names only now; the folder of PNGs last."""
    with output_errors(out):
        for name in ("results.json", "overlay.mp4", "masks"):
            target = out / name
            if target.is_dir():
                shutil.rmtree(target)
            if (work / name).exists():
                os.replace(work / name, target)
            else:
                target.unlink(missing_ok=True)
        shutil.rmtree(work)
