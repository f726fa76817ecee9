# SPDX-License-Identifier: Apache-2.0
"""A strip of small pictures of one video, side by side in one JPEG."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np

from pyvseg.errors import VideoError
from pyvseg.video.palette import PALETTE
from pyvseg.video.png import read_labels
from pyvseg.video.writer import output_errors
from pyvseg.view.results import Entry

PICTURES, HEIGHT = 5, 96  # in a strip, in pixels


def write_strip(entry: Entry) -> Path | None:
    """Writes the strip of a video unless a newer one is there; None where the video has no pictures. Raises OutputError."""
    source, strip = entry.overlay or entry.masks, entry.strip
    if source is None:
        return None
    if strip.is_file() and strip.stat().st_mtime >= source.stat().st_mtime:
        return strip
    pictures = [_small(image) for image in (_of_overlay(source) if entry.overlay else _of_masks(source))]
    if not pictures:
        return None
    _, data = cv2.imencode(".jpg", np.concatenate(pictures, 1)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 75])
    temporary = Path(f"{strip}.part")
    with output_errors(strip):
        temporary.write_bytes(data)
        os.replace(temporary, strip)
    return strip


def _small(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return cv2.resize(image, (max(1, round(HEIGHT * width / height)), HEIGHT), interpolation=cv2.INTER_AREA)


def _of_overlay(path: Path) -> Iterator[np.ndarray]:
    """Evenly spread frames; where there are key frames enough only they are decoded."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            keys = sum(sample.is_keyframe for sample in stream.index_entries)
            if keys >= PICTURES:
                stream.codec_context.skip_frame = "NONKEY"
            wanted = _spread(keys if keys >= PICTURES else stream.frames)
            for position, frame in enumerate(container.decode(stream)):
                if position in wanted:
                    yield frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, OSError, IndexError):
        return


def _of_masks(folder: Path) -> Iterator[np.ndarray]:
    files = sorted(folder.glob("*.png"))
    for position in sorted(_spread(len(files))):
        try:
            yield PALETTE[read_labels(files[position])]
        except VideoError:
            continue


def _spread(count: int) -> set[int]:
    """At most PICTURES of `count` positions, in the middles of equal parts."""
    return {int((i + 0.5) * count / PICTURES) for i in range(PICTURES)} if count > PICTURES else set(range(count))
