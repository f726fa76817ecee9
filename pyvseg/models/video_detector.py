# SPDX-License-Identifier: Apache-2.0
"""What TransVOD, TransVOD++ and TransVOD Lite have in common: sizes, the detector of single frames, and what is kept of a video."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pyvseg.layers.backbones import ResNetSizes
from pyvseg.layers.deformable_detr import DeformableDETR, Detections, Grid
from pyvseg.layers.pyramid import SwinPyramidSizes
from pyvseg.layers.transfer import constant
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.mask2former import PIXEL_MEAN, PIXEL_STD
from pyvseg.models.spool import Spool

MINED = (80, 50, 30)  # queries of a frame that take part in the three rounds of the temporal transformer


@dataclass(frozen=True)
class DetectorSettings:
    """Sizes of one variant.

    classes                 logits of a query; class 0 is never a target, class i is category i of ImageNet VID
    hidden, ffn             channels of the queries, inner width of the feed-forward layers
    short_side, long_side   frames are resized to this shorter side, unless the longer would pass its bound; None: not at all
    """

    classes: int = 31
    queries: int = 300
    backbone: ResNetSizes | SwinPyramidSizes = ResNetSizes(50, dilated=True)
    hidden: int = 256
    ffn: int = 1024
    heads: int = 8
    points: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    short_side: int | None = 600
    long_side: int = 1000
    mean: tuple[float, float, float] = PIXEL_MEAN
    std: tuple[float, float, float] = PIXEL_STD
    joint: ClassVar[bool] = False  # frames pass through the network one by one


class Prediction(NamedTuple):
    """Of B frames: logits (B, Q, classes) and boxes (B, Q, 4): centre x, y, width, height, as parts of the image."""

    logits: Tensor
    boxes: Tensor


class FrameDetections(NamedTuple):
    """N objects in a frame, best first: scores (N,), labels (N,) int64 as in `DetectorSettings`, boxes (N, 4) as x1, y1, x2, y2 in
    pixels of the video."""

    scores: Tensor
    labels: Tensor
    boxes: Tensor


class Encoded(NamedTuple):
    """frames   the system's own named tuple of tensors (B, ...)"""

    frames: Any
    grid: Grid


@dataclass
class DetectionState:
    """What a video's result depends on: what every frame gave, in a spool, one tensor after the other."""

    size: FrameSize
    grid: Grid = (0, 0)
    frames: int = 0
    kept: Spool = field(default_factory=Spool)


class VideoDetector(nn.Module):
    """The network of single frames. A system adds `encode`, `finish`, and `keep`, the named tuple of what it keeps of each frame."""

    keep: type
    TOP = 100  # (query, class) pairs that are a frame's result

    def __init__(self, settings: DetectorSettings) -> None:
        super().__init__()
        self.settings = s = settings
        self.backbone = s.backbone.build()
        self.detector = DeformableDETR(
            self.backbone.channels[-1], width=s.hidden, heads=s.heads, points=s.points, hidden=s.ffn, queries=s.queries, classes=s.classes,
            encoder_layers=s.encoder_layers, decoder_layers=s.decoder_layers,
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return self.detector.query_embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.detector.query_embed.weight.device

    def detections(self, images: Tensor) -> Detections:
        """Normalised images (B, 3, H, W) -> what the single frames show."""
        return self.detector(self.backbone(images.to(self.dtype))[-1])

    def new_state(self, height: int, width: int) -> DetectionState:
        """For a video of that size."""
        return DetectionState(frame_size(height, width, self.settings.short_side, self.settings.long_side))

    def encode(self, images: Tensor) -> Encoded:
        """Normalised images (B, 3, H, W) -> all that results need of the frames, whatever frames they are seen with."""
        raise NotImplementedError

    def link(self, features: Encoded, state: DetectionState) -> None:
        """Keeps the next frames."""
        state.grid = features.grid
        for frame in zip(*features.frames):
            state.frames += 1
            for part in frame:
                state.kept.later(part)

    def kept(self, state: DetectionState, frame: int, *names: str) -> list[Tensor]:
        """Parts of what was kept of a frame, without batch."""
        parts = self.keep._fields
        return [state.kept[frame * len(parts) + parts.index(name)].to(self.device) for name in names]

    def results(self, prediction: Prediction, size: tuple[int, int]) -> list[FrameDetections]:
        """The best (query, class) pairs of each frame, boxes for a video of `size` (height, width). As published there is neither a
        threshold nor a suppression of overlaps, boxes may leave the frame, and class 0 may occur."""
        return [best_pairs(*frame, size, self.TOP) for frame in zip(*prediction)]

    def finish(self, state: DetectionState) -> Iterator[tuple[int, FrameDetections]]:
        """Every frame's number and its objects, in the order in which they are computed."""
        raise NotImplementedError


def best_pairs(logits: Tensor, boxes: Tensor, size: tuple[int, int], top: int) -> FrameDetections:
    """Of one frame: logits (Q, K), boxes (Q, 4) -> the `top` likeliest (query, class) pairs."""
    scores, index = logits.float().sigmoid().flatten().topk(min(top, logits.numel()))
    height, width = size
    corners = to_corners(boxes.float())[index // logits.shape[1]] * constant((width, height, width, height), boxes.device)
    return FrameDetections(scores, index % logits.shape[1], corners)


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre x, y, width, height -> x1, y1, x2, y2"""
    centre, half = boxes[..., :2], 0.5 * boxes[..., 2:]
    return torch.cat([centre - half, centre + half], -1)


def frame_size(height: int, width: int, short_side: int | None, long_side: int) -> FrameSize:
    """As DETR has it: the longer side is cut to whole pixels, nothing is padded."""
    short, long = min(height, width), max(height, width)
    if short_side is not None and long / short * short_side > long_side:
        short_side = max(1, round(long_side * short / long))
    resized = (height, width)
    if short_side not in (None, short):
        other = int(short_side * long / short)
        resized = (short_side, other) if height <= width else (other, short_side)
    return FrameSize((height, width), resized, resized)


