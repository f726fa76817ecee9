# SPDX-License-Identifier: Apache-2.0
"""Short training sequences out of still images: a warped image, or cut-out objects that move over a moving background."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

FILL = (124, 116, 104)  # where a warp leaves the image; the mean colour, which is zero after normalisation


@dataclass(frozen=True)
class LabelledImage:
    """image uint8 RGB (H, W, 3); labels uint8 (H, W), 0 = background, other values = objects."""

    image: np.ndarray
    labels: np.ndarray


class Motion:
    """A smooth path of affine maps with an elastic part: where output pixels of frame t come from in the source.

    centre, scale  source point at the output's centre, and source pixels per output pixel
    strength       0 keeps still, 1 moves a lot between two frames
    """

    def __init__(self, rng: np.random.Generator, centre: np.ndarray, scale: float, size: int, strength: float) -> None:
        self.rng, self.size, self.strength = rng, size, strength
        self.state = np.array([*centre, np.log(scale), rng.uniform(-0.35, 0.35), 0.0])
        extent = size * scale
        # Per frame: shift in x and y, zoom, rotation, shear.
        self.step = np.array([0.12 * extent, 0.09 * extent, 0.12, 0.2, 0.12]) * strength
        self.velocity = rng.normal(size=5) * self.step
        self.flip = rng.random() < 0.5
        self.bend = rng.normal(size=(2, 4, 4)) * 0.03 * size if rng.random() < 0.6 else np.zeros((2, 4, 4))

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """Maps (x, y) float32 (size, size) for cv2.remap, and one step along the path."""
        x, y, log_scale, angle, shear = self.state
        grid = (np.arange(self.size) - (self.size - 1) / 2).astype(np.float32)
        u, v = np.meshgrid(-grid if self.flip else grid, grid)
        du, dv = (cv2.resize(b.astype(np.float32), (self.size, self.size), interpolation=cv2.INTER_CUBIC) for b in self.bend)
        u, v, scale = u + du, v + dv, np.exp(log_scale)
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        maps = x + cos * (u + shear * v) - sin * v, y + sin * (u + shear * v) + cos * v
        self.velocity = 0.8 * self.velocity + 0.4 * self.rng.normal(size=5) * self.step
        self.state = self.state + self.velocity
        self.bend = self.bend + self.rng.normal(size=self.bend.shape) * 0.022 * self.size * self.strength
        return maps[0].astype(np.float32), maps[1].astype(np.float32)


def warp(source: LabelledImage, maps: tuple[np.ndarray, np.ndarray], border: int = cv2.BORDER_CONSTANT) -> LabelledImage:
    image = cv2.remap(source.image, *maps, cv2.INTER_LINEAR, borderMode=border, borderValue=FILL)
    labels = cv2.remap(source.labels, *maps, cv2.INTER_NEAREST, borderMode=border, borderValue=0)
    return LabelledImage(image, labels)


def aim(rng: np.random.Generator, mask: np.ndarray, size: int, share: tuple[float, float]) -> tuple[np.ndarray, float]:
    """Centre and scale at which the mask's box takes a random `share` of the output's side, somewhat off centre."""
    ys, xs = np.nonzero(mask)
    low, high = np.array([xs.min(), ys.min()]), np.array([xs.max(), ys.max()])
    extent = max(*(high - low), 8)
    scale = extent / (size * rng.uniform(*share))
    return (low + high) / 2 + rng.uniform(-0.25, 0.25, 2) * size * scale * (1 - extent / size / scale).clip(0.2, 1), scale


def warped_image(rng: np.random.Generator, source: LabelledImage, length: int, size: int) -> list[LabelledImage]:
    """The whole image moves and bends; its objects are the objects (the static stage of STCN)."""
    ids = np.unique(source.labels)[1:]
    centre, scale = aim(rng, source.labels == rng.choice(ids), size, (0.2, 0.9))
    scale = min(scale, 1.2 * min(source.labels.shape) / size)  # mostly image, little fill
    motion = Motion(rng, centre, scale, size, rng.uniform(0.2, 1.0))
    return [warp(source, motion.next()) for _ in range(length)]


def pasted_objects(
    rng: np.random.Generator, background: LabelledImage, objects: list[LabelledImage], length: int, size: int
) -> list[LabelledImage]:
    """Objects 1, 2, ... each on a path of its own over a moving background; later objects cover earlier ones."""
    height, width = background.labels.shape
    scale = min(height, width) / size * rng.uniform(0.4, 1.0)
    centre = np.array([width, height]) * rng.uniform(0.35, 0.65, 2)
    camera = Motion(rng, centre, scale, size, rng.uniform(0, 0.6))
    paths = [Motion(rng, *aim(rng, o.labels > 0, size, (0.15, 0.75)), size, rng.uniform(0.2, 1.2)) for o in objects]
    spread = [rng.uniform(-0.3, 0.3, 2) * size for _ in objects]
    frames = []
    for _ in range(length):
        canvas = warp(background, camera.next(), cv2.BORDER_REFLECT_101).image.astype(np.float32)
        labels = np.zeros((size, size), np.uint8)
        for i, (source, path, offset) in enumerate(zip(objects, paths, spread), 1):
            x, y = path.next()
            shifted = x - np.float32(offset[0] * np.exp(path.state[2])), y - np.float32(offset[1] * np.exp(path.state[2]))
            cutout = warp(source, shifted)
            inside = (cutout.labels > 0).astype(np.float32)
            alpha = cv2.GaussianBlur(inside, (3, 3), 0)[..., None]
            canvas = canvas * (1 - alpha) + cutout.image * alpha
            labels[inside > 0] = i
        frames.append(LabelledImage(canvas.astype(np.uint8), labels))
    return frames


def blob(rng: np.random.Generator, texture: np.ndarray, size: int = 192) -> LabelledImage:
    """A procedural object: a random smooth outline (sometimes with a hole) filled with a piece of some image, tinted."""
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    radius = np.ones_like(angles)
    for k in range(1, 6):
        radius += rng.normal() * 0.35 / k * np.cos(k * angles + rng.uniform(0, 2 * np.pi))
    radius = np.clip(radius, 0.15, None) / np.clip(radius, 0.15, None).max() * 0.47 * size
    stretch = rng.uniform(0.4, 1.0)
    points = np.stack([radius * np.cos(angles), stretch * radius * np.sin(angles)], 1) + size / 2
    labels = np.zeros((size, size), np.uint8)
    cv2.fillPoly(labels, [points.astype(np.int32)], 1)
    if rng.random() < 0.2:
        cv2.circle(labels, (size // 2, size // 2), int(radius.min() * stretch * 0.6), 0, -1)
    height, width = texture.shape[:2]
    motion = Motion(rng, np.array([width, height]) * rng.uniform(0.2, 0.8, 2), rng.uniform(0.3, 1.0), size, 0)
    piece = cv2.remap(texture, *motion.next(), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101).astype(np.float32)
    mix = rng.uniform(0, 0.6)
    return LabelledImage(((1 - mix) * piece + mix * rng.uniform(0, 255, 3)).clip(0, 255).astype(np.uint8), labels)


def shade(rng: np.random.Generator, frames: list[LabelledImage]) -> list[LabelledImage]:
    """Colour jitter shared by the sequence and more per frame, so that an object is not known by its exact pixels alone."""
    gain, offset = rng.uniform(0.75, 1.25, 3) * rng.uniform(0.8, 1.2), rng.uniform(-20, 20)
    grey, blur, noise = rng.random() < 0.05, rng.random() < 0.3, rng.random() < 0.25
    change = rng.uniform(0, 0.2) if rng.random() < 0.7 else 0.03
    shaded = []
    for frame in frames:
        image = frame.image * (gain * (1 + change * rng.uniform(-1, 1, 3) * 0.5) * (1 + change * rng.uniform(-1, 1)))
        image = image + offset + 100 * change * rng.uniform(-1, 1)
        if rng.random() < 0.5:
            image = image * _light(rng, image.shape[:2], 2 * change)
        if blur:
            image = _streak(rng, image)
        if rng.random() < change:
            small = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            image = cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        if noise:
            image = image + rng.normal(0, 6, image.shape)
        image = image.clip(0, 255).astype(np.uint8)
        if grey:
            image = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, 2)
        shaded.append(LabelledImage(image, frame.labels))
    return shaded


def _light(rng: np.random.Generator, size: tuple[int, int], amount: float) -> np.ndarray:
    """A smooth brightness field (H, W, 1) around 1: shadows and highlights that move from frame to frame."""
    coarse = 1 + amount * rng.uniform(-1, 1, (4, 4)).astype(np.float32)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)[..., None]


def _streak(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Motion blur along a random direction."""
    length = int(rng.integers(2, 8))
    kernel = np.zeros((9, 9), np.float32)
    angle = rng.uniform(0, np.pi)
    end = (np.array([np.cos(angle), np.sin(angle)]) * length / 2).round().astype(int)
    cv2.line(kernel, (4 - int(end[0]), 4 - int(end[1])), (4 + int(end[0]), 4 + int(end[1])), 1.0)
    return cv2.filter2D(image, -1, kernel / kernel.sum())
