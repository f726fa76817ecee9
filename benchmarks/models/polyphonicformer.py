# SPDX-License-Identifier: Apache-2.0
"""PolyphonicFormer frame by frame, beside the published formulation of the same network, of its merge and of its depth:
`python -m benchmarks.models.polyphonicformer`.

The published formulation is that of `benchmarks.models.video_knet`, and further: features of depth transformed by each stage, a map of
depth for every kernel after every stage, all of them at full size, and one assignment for each segment. What the last stage says of
classes and masks is drawn, the same for all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.models import video_knet
from benchmarks.models.panoptic import How, Stopwatch
from benchmarks.models.video_knet import compare, drawn
from pyvseg import ops
from pyvseg.layers.depth_kernels import DepthFrames, DepthKernelHead, metres
from pyvseg.layers.inference import for_inference
from pyvseg.models.knet_panoptic import Segment
from pyvseg.models.polyphonicformer import DepthSegments, PolyphonicFormer, PolyphonicFormerSettings, PolyphonicFrames

DATA = {"cityscapes_dvps": (1024, 2048), "half": (512, 1024)}


class Published(video_knet.Published):
    def next(self, images: Tensor) -> None:
        with ops.backend("reference"):
            frame = self.timed("network", lambda: self.network(images))
            panoptic = self.timed("panoptic merge", lambda: self.merge(None))
            depth = self.timed("depth", lambda: self.depth(frame, panoptic))
            self.timed("tracking and maps", lambda: self.track(DepthSegments(frame, panoptic, depth)))

    def network(self, images: Tensor) -> PolyphonicFrames:
        model = self.model
        initial, maps = model.initial, model.fpn(model.backbone(images))
        localization, semantic, depth = initial.fpn(maps)
        localization, semantic, depth = initial.loc(localization), initial.seg(semantic), initial.depth(depth)
        masks, logits, dense = initial.kernels(localization), initial.classes(semantic), initial.direct(depth)
        features, things = localization + semantic, initial.classes.out_channels - initial.stuff
        kernels = initial.kernels.weight[None, :, :, 0, 0] + torch.einsum("bnhw,bchw->bnc", (masks.sigmoid() > 0.5).float(), features)
        masks = torch.cat([masks, logits[:, things:]], 1)
        kernels = torch.cat([kernels, initial.classes.weight[None, things:, :, 0, 0]], 1)
        frames = DepthFrames(features, kernels, masks, logits, depth, initial.direct.weight[None, :, :, 0, 0].expand_as(kernels), dense)
        for stage in model.stages:
            frames, classes, self.logits = self.stage(stage, frames)
        return PolyphonicFrames(classes, frames.masks, frames.depth_kernels, frames.depth_features, frames.dense, *maps)

    def stage(self, stage: DepthKernelHead, frames: DepthFrames) -> tuple[DepthFrames, Tensor, Tensor]:
        features, depth = stage.feat_transform(frames.features), stage.feat_depth_transform(frames.depth_features)
        inside = (frames.masks.sigmoid() > 0.5).float()
        kernels = stage.refine(torch.einsum("bnhw,bchw->bnc", inside, features), frames.kernels)
        own = stage.update_depth(torch.einsum("bnhw,bchw->bnc", inside, depth), frames.depth_kernels + frames.kernels)
        own = stage.ffn_depth(stage.norm_depth(stage.attention_depth(own, own, own, residual=own)))
        masks = F.conv2d(features, stage.fc_mask(stage.mask_fcs(kernels))[0, :, :, None, None])
        logits = F.conv2d(depth, stage.fc_depth(stage.depth_regs(own))[0, :, :, None, None])
        for maps in (masks, logits):
            F.interpolate(maps, scale_factor=self.model.settings.upsample, mode="bilinear", align_corners=False)
        return frames._replace(kernels=kernels, masks=masks, depth_kernels=own), stage.classify(kernels), logits

    def depth(self, frame: PolyphonicFrames, panoptic) -> np.ndarray:
        s, size = self.model.settings, self.state.size
        logits = F.interpolate(torch.cat([frame.dense, self.logits], 1), scale_factor=s.upsample, mode="bilinear")
        full = F.interpolate(metres(logits, s.nearest, s.farthest), size.padded, mode="bilinear")[0, :, : size.source[0], : size.source[1]]
        full = F.interpolate(full[None], size.source, mode="bilinear")[0]
        result, labels = full[0].clone(), torch.from_numpy(panoptic.labels)
        for i, segment in enumerate(panoptic.segments, 1):
            inside = labels == i
            result[inside] = full[1 + segment.kernel][inside]
        return result.numpy()

    def boxes(self, result: Tensor, segments: list[Segment], semantic: Tensor | None) -> np.ndarray:
        places = ((result == i).nonzero() for i, segment in enumerate(segments, 1) if segment.is_thing)
        return np.array([[*at.amin(0).flip(0), *at.amax(0).flip(0)] for at in places], np.float32).reshape(-1, 4)


class Ours:
    def __init__(self, model: PolyphonicFormer, state, timed: Stopwatch, given: tuple[Tensor, Tensor]) -> None:
        self.model, self.state, self.timed, self.given = model, state, timed, [logits[None].to(model.dtype) for logits in given]

    def next(self, images: Tensor) -> None:
        frame = self.timed("network", lambda: self.model.encode(images))
        frame = frame._replace(classes=self.given[0], masks=self.given[1])
        clip = self.timed("panoptic merge and depth", lambda: self.model.segment_clip(frame, self.state))
        self.timed("tracking and maps", lambda: self.model._frame(clip, self.state))


class Frames(video_knet.Frames):
    @torch.inference_mode()
    def __init__(self, how: How, data: str, cpu_time: bool) -> None:
        torch.manual_seed(0)
        model, self.timed = PolyphonicFormer(PolyphonicFormerSettings()).eval(), Stopwatch(cpu_time)
        state = model.new_state(*DATA[data])
        given = drawn(model.settings, state.size.padded)
        self.images = torch.randn(1, 3, *state.size.padded)
        if how.dtype is None:
            self.frames = Published(model, state, self.timed, given)
        else:
            self.frames = Ours(for_inference(model, how.dtype), state, self.timed, given)
            self.images = self.images.contiguous(memory_format=torch.channels_last)


def main(data: tuple[str, ...] = ("cityscapes_dvps",), rounds: int = 3, threads: int = 2, cpu_time: bool = False, out: Path | None = None) -> None:
    """Time PolyphonicFormer (ResNet-50).

    Args:
        data: cityscapes_dvps (1024 x 2048, 12 GB for all ways), half (512 x 1024).
        rounds: every way runs once per round, the best counts.
        threads: of PyTorch.
        cpu_time: seconds of all threads instead of the clock's, for a busy machine; set GOMP_SPINCOUNT=0, or waiting counts too.
        out: write the figures as JSON.
    """
    compare("PolyphonicFormer ResNet-50", Frames, data, rounds, threads, cpu_time, out)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.models.polyphonicformer")
