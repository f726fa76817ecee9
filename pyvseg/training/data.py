# SPDX-License-Identifier: Apache-2.0
"""Training samples for semi-supervised segmentation, drawn from still images with masks and from annotated videos."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import IterableDataset

from pyvseg.errors import PyvsegError
from pyvseg.training.sequences import LabelledImage, Motion, aim, blob, pasted_objects, shade, warp, warped_image
from pyvseg.video.png import read_labels

MIN_SHARE = 0.004  # an object smaller than this share of the first frame is not asked for
MAX_OBJECTS = 2


def read_rgb(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise PyvsegError(f"{path}: not a readable image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


class MaskFolder:
    """IMAGES/NAME.jpg with MASKS/NAME.png; every label above zero belongs to one object."""

    def __init__(self, images: Path, masks: Path) -> None:
        found = {p.stem: p for p in sorted(images.iterdir())}
        self.pairs = [(found[p.stem], p) for p in sorted(masks.glob("*.png")) if p.stem in found]
        if not self.pairs:
            raise PyvsegError(f"{images}: no image has a mask of the same name in {masks}")

    def __len__(self) -> int:
        return len(self.pairs)

    @functools.lru_cache(maxsize=4096)  # noqa: B019  (lives as long as the run)
    def __getitem__(self, i: int) -> LabelledImage:
        image, mask = self.pairs[i]
        return _at_most(LabelledImage(read_rgb(image), (read_labels(mask) > 0).astype(np.uint8)))


class CocoInstances:
    """Images of a COCO instance file that have at least one object of reasonable size; labels are numbered by instance."""

    def __init__(self, annotations: Path, images: Path) -> None:
        data = json.loads(annotations.read_text())
        self.root, self.images, self.instances = images, {}, {}
        for image in data["images"]:
            self.images[image["id"]] = image
        for a in data["annotations"]:
            image = self.images[a["image_id"]]
            if not a.get("iscrowd") and a["area"] > MIN_SHARE * image["height"] * image["width"]:
                self.instances.setdefault(a["image_id"], []).append(a["segmentation"])
        self.order = sorted(self.instances)

    def __len__(self) -> int:
        return len(self.order)

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def __getitem__(self, i: int) -> LabelledImage:
        image = self.images[self.order[i]]
        size = image["height"], image["width"]
        labels = np.zeros(size, np.uint8)
        for n, polygons in enumerate(self.instances[self.order[i]][:254], 1):
            rle = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
            labels[coco_mask.decode(rle) > 0] = n
        return _at_most(LabelledImage(read_rgb(self.root / Path(image["file_name"]).name), labels))


class AnnotatedVideo:
    """One video folder of frames and palette masks of the same names; frames without a mask are left out."""

    def __init__(self, frames: Path, masks: Path) -> None:
        found = {p.stem: p for p in sorted(frames.iterdir())}
        self.pairs = [(found[p.stem], p) for p in sorted(masks.glob("*.png")) if p.stem in found]
        if len(self.pairs) < 3:
            raise PyvsegError(f"{masks}: fewer than three annotated frames")

    @functools.lru_cache(maxsize=512)  # noqa: B019
    def frame(self, i: int) -> LabelledImage:
        image, mask = self.pairs[i]
        return _at_most(LabelledImage(read_rgb(image), read_labels(mask)), 640)

    def sample(self, rng: np.random.Generator, length: int, size: int) -> list[LabelledImage]:
        """Frames in order or reversed, up to five annotated steps apart, under one crop with a little camera motion."""
        gap = int(rng.integers(1, 1 + min(5, max(1, (len(self.pairs) - 1) // (length - 1)))))
        start = int(rng.integers(0, max(1, len(self.pairs) - gap * (length - 1))))
        order = [min(start + gap * i, len(self.pairs) - 1) for i in range(length)]
        frames = [self.frame(i) for i in (order if rng.random() < 0.5 else order[::-1])]
        ids = np.unique(frames[0].labels)[1:]
        target = frames[0].labels == rng.choice(ids) if len(ids) else np.ones_like(frames[0].labels)
        path = Motion(rng, *aim(rng, target, size, (0.2, 0.8)), size, 0.1)
        return [warp(frame, path.next()) for frame in frames]


def _at_most(source: LabelledImage, side: int = 480) -> LabelledImage:
    factor = side / max(source.labels.shape)
    if factor >= 1:
        return source
    image = cv2.resize(source.image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    labels = cv2.resize(source.labels, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    return LabelledImage(image, labels)


@dataclass
class Mixture(IterableDataset):
    """An endless stream of samples (frames uint8 (T, S, S, 3), masks uint8 (T, S, S) with objects 1..n, n <= 2).

    images   sources of labelled images; warped whole, or their objects cut out and pasted
    videos   annotated videos, drawn with probability `video_share`
    """

    images: list
    videos: list[AnnotatedVideo]
    length: int
    size: int
    seed: int = 0
    video_share: float = 0.1

    def __iter__(self):
        cv2.setNumThreads(0)
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng((self.seed, 0 if worker is None else worker.id))
        while True:
            sample = self._targets(rng, shade(rng, self._sequence(rng)))
            if sample is not None:
                yield sample

    def _sequence(self, rng: np.random.Generator) -> list[LabelledImage]:
        if self.videos and rng.random() < self.video_share:
            return self.videos[rng.integers(len(self.videos))].sample(rng, self.length, self.size)
        if rng.random() < 0.4:
            return warped_image(rng, self._image(rng), self.length, self.size)
        objects = [self._object(rng) for _ in range(rng.integers(1, 5))]
        if rng.random() < 0.25:
            objects.append(objects[0])  # a second one that looks the same: only its place tells them apart
        return pasted_objects(rng, self._image(rng), objects, self.length, self.size)

    def _image(self, rng: np.random.Generator) -> LabelledImage:
        while True:
            source = self.images[rng.integers(len(self.images))]
            image = source[int(rng.integers(len(source)))]
            if image.labels.any():
                return image

    def _object(self, rng: np.random.Generator) -> LabelledImage:
        if rng.random() < 0.3:
            return blob(rng, self._image(rng).image)
        source = self._image(rng)
        chosen = source.labels == rng.choice(np.unique(source.labels)[1:])
        return LabelledImage(source.image, chosen.astype(np.uint8))

    def _targets(self, rng: np.random.Generator, frames: list[LabelledImage]) -> tuple[Tensor, Tensor] | None:
        """Keep up to two objects of the first frame as 1 and 2, everything else becomes background."""
        ids, counts = np.unique(frames[0].labels, return_counts=True)
        ids = ids[(ids > 0) & (counts > MIN_SHARE * self.size**2)]
        if not len(ids):
            return None
        chosen = rng.permutation(ids)[: rng.integers(1, MAX_OBJECTS + 1)]
        table = np.zeros(256, np.uint8)
        table[chosen] = np.arange(1, len(chosen) + 1)
        images = np.stack([f.image for f in frames])
        return torch.from_numpy(images), torch.from_numpy(table[np.stack([f.labels for f in frames])])
