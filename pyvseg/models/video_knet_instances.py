# SPDX-License-Identifier: Apache-2.0
"""Video K-Net (Li et al., CVPR 2022) for instance segmentation: K-Net frame by frame, then kernels of the whole video, which every
frame's features refine. Offline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.kernel_head import KernelHead
from pyvseg.models.frame_size import FloatFrameSize, FrameSize
from pyvseg.models.knet import KNet, KNetSettings
from pyvseg.models.spool import Spool
from pyvseg.models.video_instances import Selection, VideoInstances, render


@dataclass(frozen=True)
class VideoKNetInstancesSettings(KNetSettings):
    """clip_stages             of kernels of the whole video, and a last one that fits them to each frame
    top                     tracks in a result
    short_side, long_side   frames are resized to this shorter side, unless the longer would pass its bound"""

    clip_stages: int = 2
    top: int = 10
    short_side: int | None = 360
    long_side: int = 640

    joint = False  # frames are passed one by one, memory does not grow with the video


class FrameKernels(NamedTuple):
    """T frames: features (T, C, h, w), masks (T, P, h, w) uint8, 1 inside, kernels (T, P, C)."""

    features: Tensor
    masks: Tensor
    kernels: Tensor


@dataclass
class VideoKNetClip:
    """The frames so far.

    kernels    (P, C) sum over the frames, float32
    features   (h, w, C) and masks (P, h, w) of each, which wait in temporary files when they are many
    """

    size: FrameSize
    kernels: Tensor | None = None
    features: Spool = field(default_factory=Spool)
    masks: Spool = field(default_factory=Spool)


class VideoKNetInstances(KNet):
    framewise = False

    def __init__(self, settings: VideoKNetInstancesSettings) -> None:
        super().__init__(settings)
        s = settings
        classes = [s.classes] * s.clip_stages + [0]
        self.clip_stages = nn.ModuleList(KernelHead(s.channels, s.heads, s.ffn, count) for count in classes)

    def new_state(self, size: FrameSize) -> VideoKNetClip:
        return VideoKNetClip(FloatFrameSize(size.source, size.resized, size.padded))

    def per_frame(self, images: Tensor) -> FrameKernels:
        """Normalised images (B, 3, H, W), padded to multiples of 32: every frame on its own."""
        frames = self.encode(images)
        last = self.stages[-1](frames.features, frames.kernels, frames.masks)
        return FrameKernels(frames.features, (last.masks > 0).to(torch.uint8), last.kernels)

    def segment_clip(self, features: FrameKernels, state: VideoKNetClip) -> FrameKernels:
        return features

    def link(self, clip: FrameKernels, state: VideoKNetClip) -> None:
        total = clip.kernels.float().sum(0)
        state.kernels = total if state.kernels is None else state.kernels + total
        for features, masks in zip(clip.features, clip.masks):
            state.features.later(features.permute(1, 2, 0))  # as they lie in memory
            state.masks.later(masks)

    def finish(self, state: VideoKNetClip, top: int | None = None, compat: bool = True) -> VideoInstances:
        """Every frame is passed once for each stage of the whole video, and once for its masks."""
        kernels = (state.kernels / len(state.features)).to(self.dtype)[None]
        for stage in range(self.settings.clip_stages):
            kernels = self.refine(stage, kernels, state)
        probabilities = self.clip_stages[-2].classify(kernels)[0].float().sigmoid()
        chosen = Selection.best(probabilities, top or self.settings.top, compat=compat)

        def logits_at(frame: int, objects: list[int]) -> tuple[list[int], Tensor]:
            masks = self.clip_stages[-1](*self.frame(self.settings.clip_stages, frame, kernels, state)).masks[:, objects].float()
            masks = F.interpolate(masks, scale_factor=self.settings.upsample, mode="bilinear", align_corners=False)
            # Published are probabilities that are resized, and set above one half.
            return list(range(len(objects))), masks[0].sigmoid() - 0.5

        return render(chosen, len(state.features), state.size, logits_at, device=self.device)

    def refine(self, stage: int, kernels: Tensor, state: VideoKNetClip) -> Tensor:
        """Kernels (1, P, C) by the mean of what lies in their masks over the frames."""
        head, frames = self.clip_stages[stage], len(state.features)
        inputs = (self.frame(stage, t, kernels, state) for t in range(frames))
        pooled = sum(head.pool(masks, head.feat_transform(features)) for features, _, masks in inputs)
        return head.refine(pooled / frames, kernels)

    def frame(self, stage: int, frame: int, kernels: Tensor, state: VideoKNetClip) -> tuple[Tensor, Tensor, Tensor]:
        """What a stage takes: features, kernels, and the masks of the stage before it."""
        features = state.features[frame].to(kernels).permute(2, 0, 1)[None]
        if stage == 0:
            return features, kernels, state.masks[frame].to(kernels)[None]
        before = self.clip_stages[stage - 1]
        return features, kernels, before.masks(kernels, before.feat_transform(features))
