# SPDX-License-Identifier: Apache-2.0
"""Small videos made on the spot."""

from pathlib import Path

import av
import cv2
import numpy as np


def images(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """A bright square that moves to the right over a dark gradient; uint8 (H, W, 3), RGB."""
    frames = []
    for t in range(count):
        image = np.zeros((height, width, 3), np.uint8)
        image[..., 1] = np.linspace(0, 90, width, dtype=np.uint8)
        left = (4 + t) % (width - 12)
        image[height // 4 : height // 2, left : left + 12] = (250, 200, 30)
        frames.append(image)
    return frames


def write_video(path: Path, frames: list[np.ndarray], *, codec: str = "libx264", rate: int = 25, **options: str) -> Path:
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "10"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_images(folder: Path, frames: list[np.ndarray], suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    for t, image in enumerate(frames):
        cv2.imwrite(str(folder / f"{t:05d}{suffix}"), image[..., ::-1])
    return folder


def square(value: int = 1, height: int = 48, width: int = 64) -> np.ndarray:
    """The mask of the square in the first frame of `images`."""
    labels = np.zeros((height, width), np.uint8)
    labels[height // 4 : height // 2, 4:16] = value
    return labels
