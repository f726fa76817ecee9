# SPDX-License-Identifier: Apache-2.0
"""Frames in: video files, folders of images and arrays, decoded one at a time."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from pyvseg.errors import VideoError
from pyvseg.video import nvdec
from pyvseg.video.png import MAX_PIXELS
from pyvseg.video.types import Frame

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")  # of the files in a folder of videos
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass
class Video:
    """A video that can be iterated, frame by frame, without holding more than one frame.

    Iteration yields `Frame` and raises VideoError that names the file (and the frame) when a frame cannot be decoded or
    has another size than the first.
    """

    name: str  # stem of the file or folder
    source: str  # what error messages call it
    size: tuple[int, int]  # height, width in pixels
    fps: Fraction | None  # frames per second; None where nothing says
    frame_count: int | None  # None where nothing says; an estimate for containers without an index
    frame_names: list[str] | None  # folders only: the images' stems
    images: Callable[[], Iterator[np.ndarray]]
    first_number: int = 0  # of the names made up for frames that have none

    def __iter__(self) -> Iterator[Frame]:
        for index, image in enumerate(self.images()):
            if image.shape[:2] != self.size:
                (height, width), (was_height, was_width) = image.shape[:2], self.size
                raise VideoError(
                    f"{self.source}: frame {self.frame_name(index)} is {width}x{height} but the video began with {was_width}x{was_height}; "
                    "resize the frames to one size, or split the video there"
                )
            yield Frame(index, image, self.frame_name(index))

    def frame_name(self, index: int) -> str:
        return self.frame_names[index] if self.frame_names else f"{index + self.first_number:05d}"

    def part(self, start: int, stop: int | None) -> "Video":
        """Frames start to stop - 1 as a video of their own, counted from 0; files are decoded from their beginning, frame names stay."""
        if start < 0 or (stop is not None and stop <= start) or (self.frame_count is not None and start >= self.frame_count):
            raise VideoError(f"{self.source}: frames {start}:{stop or ''} are not in this video of {self.frame_count or 'unknown length:'} frames")
        count = None if self.frame_count is None else min(stop or self.frame_count, self.frame_count) - start
        names = self.frame_names[start:stop] if self.frame_names else None
        images = lambda: itertools.islice(self.images(), start, stop)  # noqa: E731
        return replace(self, frame_count=count, frame_names=names, images=images, first_number=start)


def open_video(source: str | Path | list[Path] | Iterable[np.ndarray] | Video, decoder: str = "cpu") -> Video:
    """Opens a video file, a folder of images (in the order of their names), a list of image files, or an iterable of uint8
    (H, W, 3) RGB arrays.

    The first frame is decoded here, so a source without frames fails at once. A one-shot iterable can be iterated once.
    decoder: "cpu", or "nvdec" for files, see `pyvseg.video.nvdec`; files that carry a rotation are decoded on the CPU.
    Raises VideoError, and PyvsegError where NVDEC is not to be had.
    """
    if isinstance(source, Video):
        return source
    if isinstance(source, list) and source and all(isinstance(path, Path) for path in source):
        return _open_images(source, source[0].parent)
    if not isinstance(source, (str, Path)):
        return _open_arrays(source)
    path = Path(source)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise VideoError(f"{path}: no such video file or folder of images")
    return _open_file(path, decoder)


def _first(images: Iterator[np.ndarray], source: str) -> np.ndarray:
    image = next(images, None)
    if image is None:
        raise VideoError(f"{source}: no frames; the video is empty or damaged")
    return image


def _open_arrays(arrays: Iterable[np.ndarray]) -> Video:
    if hasattr(arrays, "__len__"):  # a sequence can be gone through again
        count, images = len(arrays), lambda: (_check_array(array, index) for index, array in enumerate(arrays))
        first = _first(images(), "frames")
    else:
        rest = (_check_array(array, index) for index, array in enumerate(arrays))
        first = _first(rest, "frames")
        count, images = None, lambda: itertools.chain([first], rest)
    return Video("frames", "frames", first.shape[:2], None, count, None, images)


def _check_array(array: np.ndarray, index: int) -> np.ndarray:
    image = np.asarray(array)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise VideoError(f"frame {index}: got {image.dtype} {image.shape}; frames must be uint8 (H, W, 3), RGB")
    return image


def _open_folder(folder: Path) -> Video:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))
    if not files:
        raise VideoError(f"{folder}: no images in this folder; expected {', '.join(IMAGE_SUFFIXES)}")
    return _open_images(files, folder)


def _open_images(files: list[Path], folder: Path) -> Video:
    names = [path.stem for path in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise VideoError(f"{folder}: several images are called {twice}; keep one per frame")
    first = read_image(files[0])
    return Video(folder.resolve().name, str(folder), first.shape[:2], None, len(files), names, lambda: map(read_image, files))


def read_image(path: Path) -> np.ndarray:
    """One image file as uint8 (H, W, 3), RGB, turned upright as its EXIF data say. Raises VideoError."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise VideoError(f"cannot read image {path}: {error.strerror or error}") from None
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) if data.size else None
    except cv2.error:  # OpenCV refuses headers beyond its own limit before it allocates
        image = None
    if image is None or image.shape[0] * image.shape[1] > MAX_PIXELS:
        raise VideoError(f"image {path} is damaged, of an unknown format or larger than {MAX_PIXELS} pixels")
    return image


def _open_file(path: Path, decoder: str) -> Video:
    source = str(path)
    with _container(path) as (container, stream):
        fps = stream.average_rate or stream.guessed_rate
        count = stream.frames or None
        end = _declared_end(container, stream)
        if count is None and fps and end:
            count = max(1, round(end * fps))
        _check_index(stream, path)
        first = next(container.decode(stream), None) if decoder == "nvdec" else None
        decode = nvdec.decode if first is not None and not first.rotation % 360 else _decode
    first = _first(decode(path), source)
    return Video(path.stem, source, first.shape[:2], fps, count, None, lambda: decode(path))


class _container:
    """The open container and its video stream; every FFmpeg error inside becomes a VideoError that names the file."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        try:
            self.container = av.open(str(self.path))
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{self.path}: cannot be read as a video ({error.strerror}); it may be cut short, damaged or no video at all") from None
        if not self.container.streams.video:
            self.container.close()
            raise VideoError(f"{self.path}: no video stream in this file")
        stream = self.container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        return self.container, stream

    def __exit__(self, kind, error, traceback):
        self.container.close()
        if isinstance(error, av.FFmpegError):
            raise VideoError(f"{self.path}: decoding failed ({error.strerror}); the file is cut short or damaged") from None


def _check_index(stream, path: Path) -> None:
    """An index (MP4) that points past the end of the file shows at once that the file was cut."""
    length = path.stat().st_size
    if any(entry.pos + entry.size > length for entry in stream.index_entries):
        raise VideoError(f"{path}: the file is cut short: its index lists frames beyond the {length} bytes that are there; copy or download it again")


def _decode(path: Path) -> Iterator[np.ndarray]:
    with _container(path) as (container, stream):
        frame = None
        for frame in container.decode(stream):
            image = frame.to_ndarray(format="rgb24")
            yield np.ascontiguousarray(np.rot90(image, frame.rotation // 90)) if frame.rotation % 360 else image
        end, fps = _declared_end(container, stream), stream.average_rate
        if frame is not None and frame.time is not None and end and fps and Fraction(frame.time) + Fraction(3, 2) / fps < end:
            last = frame.time + 1 / fps
            raise VideoError(f"{path}: the file is cut short: frames end at {last:.2f} s of {float(end):.2f} s; copy or download it again")


def _declared_end(container, stream) -> Fraction | None:
    """Time in seconds at which the header says that the pictures end; None where it says nothing about the pictures alone."""
    if stream.duration and stream.time_base:
        return ((stream.start_time or 0) + stream.duration) * stream.time_base
    if container.duration and len(container.streams) == 1:
        return Fraction(container.duration, av.time_base)
    return None
