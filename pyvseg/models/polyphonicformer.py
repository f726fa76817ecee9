# SPDX-License-Identifier: Apache-2.0
"""PolyphonicFormer (Yuan et al., ECCV 2022) for depth-aware video panoptic segmentation: K-Net frame by frame with kernels of depth
beside its own; things are recognised by the features in their boxes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import find_objects
from torch import Tensor, nn

from pyvseg.layers.depth_kernels import DepthKernelHead, DepthKernelInit, metres
from pyvseg.layers.graphs import graphed
from pyvseg.layers.kernel_head import Way
from pyvseg.layers.roi_embedding import RoIEmbedding, pyramid_roi_align
from pyvseg.models.categories import CITYSCAPES_THINGS
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.knet_panoptic import FramePanoptic, MergeSettings, Segment, merge
from pyvseg.models.quasi_dense import Detections, Matched, QuasiDenseState, track
from pyvseg.models.video_kmax import PanopticFrame
from pyvseg.models.video_knet import VideoKNet, VideoKNetSettings, things_first
from pyvseg.ops import Resampling

LEAST_EXTENT = 1.0  # pixels: mean distance from the centre along an axis that a thing has at least


@dataclass(frozen=True)
class PolyphonicFormerSettings(VideoKNetSettings):
    """As of Video K-Net, and

    track_convs, track_width, track_hidden, embedding   of `RoIEmbedding`
    nearest, farthest                                   metres
    """

    stuff: int = 11
    categories: tuple[int, ...] = things_first(CITYSCAPES_THINGS, 19)
    link: Way | None = None
    track_layers: int = 1
    upsample: int = 2
    merge: MergeSettings = MergeSettings(score=0.3)
    track_convs: int = 4
    track_width: int = 256
    track_hidden: int = 1024
    embedding: int = 256
    nearest: float = 0.01
    farthest: float = 80.0


class PolyphonicFrames(NamedTuple):
    """B frames after the network: of the last stage classes (B, N, K) and masks (B, N, h, w), logits, and kernels of depth (B, N, C);
    features (B, C, h, w) of depth, logits (B, 1, h, w) of the depth of the frame as a whole; maps of the pyramid at strides 4 to 32."""

    classes: Tensor
    masks: Tensor
    depth_kernels: Tensor
    depth_features: Tensor
    dense: Tensor
    p4: Tensor
    p8: Tensor
    p16: Tensor
    p32: Tensor


@dataclass
class PolyphonicFormerState:
    """What a video's later frames depend on; of bounded size.

    written   frames whose result is out
    seen      of these the ones with things, by which tracks age
    """

    size: FrameSize
    written: int = 0
    seen: int = 0
    tracks: QuasiDenseState = field(default_factory=QuasiDenseState)


class DepthSegments(NamedTuple):
    """One frame before tracking: the network's, its segments, and depth float32 (H, W)."""

    frame: PolyphonicFrames
    panoptic: FramePanoptic
    depth: np.ndarray


class PolyphonicFormer(VideoKNet):
    sees_depth = True

    def make_initial(self) -> nn.Module:
        s = self.settings
        return DepthKernelInit(s.channels, s.kernels, s.classes, s.stuff)

    def make_stage(self) -> nn.Module:
        s = self.settings
        return DepthKernelHead(s.channels, s.heads, s.ffn, s.classes)

    def make_embedding(self) -> nn.Module:
        s = self.settings
        return RoIEmbedding(s.channels, s.track_width, s.track_convs, s.track_hidden, s.embedding)

    def new_state(self, height: int, width: int) -> PolyphonicFormerState:
        return PolyphonicFormerState(FrameSize.of(height, width, None))

    def encode(self, images: Tensor) -> PolyphonicFrames:
        """Normalised images (B, 3, H, W), padded to multiples of 32; no frame knows another."""
        maps = self.fpn(self.backbone(images.to(self.dtype)))
        frames = self.initial(maps)
        for stage in self.stages:
            refined = stage(frames)
            frames = frames._replace(masks=refined.masks, kernels=refined.kernels, depth_kernels=refined.depth_kernels)
        return PolyphonicFrames(refined.classes, frames.masks, frames.depth_kernels, frames.depth_features, frames.dense, *maps)

    def encode_frames(self, images: np.ndarray, state: PolyphonicFormerState) -> list[PolyphonicFrames]:
        """uint8 RGB (T, H, W, 3) -> the frames, for `step`."""
        s = self.settings
        frames = graphed(self.encode, state.size.input(images, s.mean, s.std, self.device))
        return [PolyphonicFrames(*parts) for parts in zip(*(part.split(1) for part in frames))]

    def segment_clip(self, frame: PolyphonicFrames, state: PolyphonicFormerState) -> DepthSegments:
        s = self.settings
        panoptic = merge(frame.classes[0].float().sigmoid(), frame.masks[0], None, state.size, s.stuff, s.upsample, s.merge)
        return DepthSegments(frame, panoptic, self.paste(frame, panoptic.labels, panoptic.segments, state.size))

    def paste(self, frame: PolyphonicFrames, labels: np.ndarray, segments: list[Segment], size: FrameSize) -> np.ndarray:
        """Depth (H, W): each pixel's is that of its segment's kernel there, without a segment that of the frame as a whole."""
        kernels = frame.depth_kernels[:, [segment.kernel for segment in segments]]
        logits = torch.cat([frame.dense, self.stages[-1].depth(kernels, frame.depth_features)], 1).float()
        logits = F.interpolate(logits, scale_factor=self.settings.upsample, mode="bilinear", align_corners=False)
        return chosen_depth(metres(logits[0], self.settings.nearest, self.settings.farthest), labels, size)

    def detections(self, clip: DepthSegments) -> Detections:
        segments = clip.panoptic.segments
        numbers = [i for i, segment in enumerate(segments, 1) if segment.is_thing]
        things = [segments[i - 1] for i in numbers]
        scores, labels = np.array([each.score for each in things], np.float32), np.array([each.category for each in things], np.int64)
        boxes = torch.from_numpy(extents(clip.panoptic.labels, numbers)).to(self.device)
        embeddings = self.embed(pyramid_roi_align(clip.frame[-4:], boxes)).float().cpu().numpy()
        return Detections(np.concatenate([clip.panoptic.boxes, scores[:, None]], 1), labels, embeddings)

    def track(self, found: Detections, state: PolyphonicFormerState) -> Matched:
        state.seen += 1
        return track(state.tracks, found, state.seen, self.settings.tracking)

    def _frame(self, clip: DepthSegments, state: PolyphonicFormerState) -> PanopticFrame:
        return super()._frame(clip, state)._replace(depth=clip.depth)


def chosen_depth(maps: Tensor, labels: np.ndarray, size: FrameSize) -> np.ndarray:
    """maps (1 + S, h, w) -> float32 (H, W): of each pixel the map that labels (H, W) says, as resized to the padded size and cut.

    Only that map's four cells around the pixel are read: no map is made at full size.
    """
    cells = maps.shape[1:]
    axes = [Resampling.bilinear(cell, padded, False).cut(shown) for cell, padded, shown in zip(cells, size.padded, size.source)]
    (first, weights), (column, shares) = (axis.taps(maps.device) for axis in axes)
    values, chosen = maps.contiguous().flatten(), torch.from_numpy(labels).to(maps.device).long().mul_(cells[0] * cells[1])
    total = torch.zeros(labels.shape, device=maps.device)
    for i in range(weights.shape[1]):
        rows = (first + i).clamp(max=cells[0] - 1).long()[:, None] * cells[1]
        for j in range(shares.shape[1]):
            index = chosen + (rows + (column + j).clamp(max=cells[1] - 1))
            total.addcmul_(values[index], weights[:, i, None] * shares[:, j])
    return total.cpu().numpy()


def extents(labels: np.ndarray, numbers: list[int]) -> np.ndarray:
    """Boxes (N, 4) float32 of the pixels with each number, x1, y1, x2, y2: twice the mean distance to each side of the centre."""
    parts, boxes = find_objects(labels), []
    for number in numbers:
        part = parts[number - 1]
        inside = labels[part] == number
        (y, tall), (x, wide) = (_extent(inside.sum(1 - axis), part[axis].start) for axis in (0, 1))
        boxes.append((x - wide, y - tall, x + wide, y + tall))
    return np.array(boxes, np.float32).reshape(-1, 4).clip(min=0)


def _extent(counts: np.ndarray, start: int) -> tuple[float, float]:
    """Centre and half extent of pixels, counted by their place along an axis."""
    places = np.arange(start, start + len(counts))
    centre = np.average(places, weights=counts)
    return centre, 2 * max(np.average(np.abs(places - centre), weights=counts), LEAST_EXTENT)
