# SPDX-License-Identifier: Apache-2.0
"""Results out, frame by frame: palette PNGs, an overlay video and COCO RLE. Nothing is kept in memory.

Every writer has `write(result)`, `close()` (finish; the file appears under its name only now) and `discard()`.
All raise OutputError that names the file where the disk refuses.
"""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from pyvseg.errors import OutputError
from pyvseg.video.overlay import draw_captions, draw_overlay
from pyvseg.video.png import write_labels
from pyvseg.video.rle import encode_rle
from pyvseg.video.types import FrameResult


# x264's fastest preset with the deblocking and some of the B frames that it leaves out: for pictures to look at, a quarter larger than
# those of the next preset at equal quality in half of the time. One thread: the network has use for the others.
_X264 = {"preset": "ultrafast", "crf": "22", "g": "48", "threads": "1", "x264-params": "no-deblock=0:bframes=2:b-adapt=0"}


@contextmanager
def output_errors(path: Path):
    """Turns a refusal of the disk into an OutputError that names `path`."""
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; free space or choose another --out") from None


class PngWriter:
    """FOLDER/NAME.png for every frame, in the DAVIS palette; each file is whole as soon as it has its name."""

    def __init__(self, folder: Path):
        self.folder = folder
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, result: FrameResult) -> None:
        path = self.folder / f"{result.name}.png"
        with output_errors(path):
            write_labels(path, result.labels)

    def close(self) -> None:
        pass

    def discard(self) -> None:
        pass  # finished frames are worth keeping; the engine removes the folder where they are not


class OverlayWriter:
    """An H.264 video of the frames with their masks drawn in: yuv420p MP4 with the index in front, as browsers want it.

    H.264 needs even sides; an odd side grows by repeating its last row or column. A key frame every two seconds or so lets a
    player jump, and thumbnails be made, without decoding what lies between.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: Fraction | None):
        self.path, self.temporary = path, Path(f"{path}.part")
        height, width = size
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.container = av.open(str(self.temporary), "w", format="mp4", options={"movflags": "+faststart"})
            self.stream = self.container.add_stream("libx264", rate=fps or Fraction(24), options=_X264)
            self.stream.width, self.stream.height, self.stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"

    def draw(self, result: FrameResult) -> np.ndarray:
        image = draw_overlay(result.image, result.labels)
        if result.captions:
            draw_captions(image, result.labels, result.captions)
        return image

    def write(self, result: FrameResult) -> None:
        image = self.draw(result)
        if image.shape[0] % 2 or image.shape[1] % 2:
            image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
        with output_errors(self.path):
            yuv = cv2.cvtColor(image, cv2.COLOR_RGB2YUV_I420)  # as FFmpeg would, in a third of its time
            self.container.mux(self.stream.encode(av.VideoFrame.from_ndarray(yuv, format="yuv420p")))

    def close(self) -> None:
        with output_errors(self.path):
            self.container.mux(self.stream.encode(None))
            self.container.close()
            os.replace(self.temporary, self.path)

    def discard(self) -> None:
        with suppress(OSError, av.FFmpegError):
            self.container.close()
        self.temporary.unlink(missing_ok=True)


def write_tracks(path: Path, video_id: int | str, tracks, categories: tuple[int | None, ...] | None = None) -> int:
    """A `VideoInstances` in the form of YouTube-VIS results, one entry per track: what the evaluation server takes.

    [{"video_id": ID, "score": 0.9, "category_id": 1, "segmentations": [{"size": [H, W], "counts": "..."}, null, ...]}, ...]

    categories: the category id of each class, None for classes that are left out; by default class + 1. Returns the entries.
    """
    separator, entries = "[", 0
    with output_errors(path), open(path, "w", encoding="ascii") as out:
        for track in tracks:
            category = track.label + 1 if categories is None else categories[track.label]
            if category is not None:
                entry = {"video_id": video_id, "score": track.score, "category_id": category, "object_id": track.object_id}
                entry |= {"category": track.category} if track.category else {}  # for people and pages; evaluations go by the id
                out.write(separator + json.dumps(entry | {"segmentations": track.rle}))
                separator, entries = ",\n", entries + 1
        out.write("[]\n" if not entries else "]\n")
    return entries


def join_tracks(parts: list[Path], path: Path) -> None:
    """The entries of several files of `write_tracks` in one."""
    temporary, separator = Path(f"{path}.part"), "["
    with output_errors(path):
        with open(temporary, "w", encoding="ascii") as out:
            for part in parts:
                with open(part, encoding="ascii") as file:
                    for line in file:
                        if (entry := line.strip().removeprefix("[").removesuffix("," if line.endswith(",\n") else "]")) != "":
                            out.write(separator + entry)
                            separator = ",\n"
            out.write("[]\n" if separator == "[" else "]\n")
        os.replace(temporary, path)


class RleWriter:
    """A JSON list in the form of YouTube-VIS results: one entry per object, its COCO RLE (or null) for every frame.

    [{"video_id": NAME, "category_id": 1, "object_id": ID, "score": 1.0, "segmentations": [{"size": [H, W], "counts": "..."}, null, ...]}, ...]

    The file is ordered by object but masks come by frame, so each object has a spool file until `close`.
    """

    def __init__(self, path: Path, video_name: str):
        self.path, self.video_name = path, video_name
        self.frames = 0
        self.spools = {}
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))

    def write(self, result: FrameResult) -> None:
        present = [int(i) for i in np.flatnonzero(cv2.calcHist([result.labels], [0], None, [256], [0, 256])) if i]
        lines = dict(zip(present, encode_rle(result.labels, present), strict=True))
        with output_errors(self.path):
            for object_id in {*self.spools, *result.object_ids, *present}:
                spool = self.spools.get(object_id) or self._open(object_id)
                spool.write((", " if self.frames else "") + json.dumps(lines.get(object_id)))
        self.frames += 1

    def _open(self, object_id: int):
        spool = self.spools[object_id] = open(self.folder / str(object_id), "w+", encoding="ascii")
        spool.write(", ".join(["null"] * self.frames))
        return spool

    def close(self) -> None:
        temporary = self.folder / "whole"
        with output_errors(self.path):
            with open(temporary, "w", encoding="ascii") as out:
                out.write("[")
                for position, (object_id, spool) in enumerate(sorted(self.spools.items())):
                    entry = {"video_id": self.video_name, "category_id": 1, "object_id": object_id, "score": 1.0}
                    out.write((",\n" if position else "") + json.dumps(entry)[:-1] + ', "segmentations": [')
                    spool.seek(0)
                    shutil.copyfileobj(spool, out)
                    out.write("]}")
                out.write("]\n")
            os.replace(temporary, self.path)
        self.discard()

    def discard(self) -> None:
        for spool in self.spools.values():
            with suppress(OSError, av.FFmpegError):
                spool.close()
        shutil.rmtree(self.folder, ignore_errors=True)
