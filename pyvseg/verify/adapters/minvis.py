# SPDX-License-Identifier: Apache-2.0
"""MinVIS, and the joint-clip Mask2Former, on a short video."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pyvseg.models.mask2former_video import Mask2FormerVideo
from pyvseg.models.minvis import MinVIS
from pyvseg.verify.adapters import set_criterion
from pyvseg.verify.adapters.mask2former import build, every, network_taps, settings
from pyvseg.verify.adapters.video_masks import network_input, tracks, video_taps


@torch.inference_mode()
def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    model = build(MinVIS(settings(manifest["config"])), weights)
    taps = network_taps(model)
    size, x = network_input(model, inputs)
    predictions = model(x, auxiliary=True)
    yield from video_taps(manifest, taps)
    step = every(manifest, "pred_masks")
    clip = predictions[-1]
    yield "tap/bare_logits", predictions[0].logits[None].numpy()
    yield "tap/pred_logits", clip.logits[None].numpy()
    yield "tap/pred_masks", clip.masks[:, :, ::step, ::step].transpose(0, 1)[None].numpy()
    yield "tap/pred_embds", clip.queries.permute(2, 0, 1)[None].numpy()
    state = model.new_state(size)
    orders = model.link(clip, state)
    yield "tap/permutation", torch.stack(orders[1:]).numpy()
    yield "out/track_logits", (state.logits / state.frames).numpy()
    step = every(manifest, r"out/track_masks \[Q")
    followed = torch.stack([masks[order] for masks, order in zip(clip.masks, orders)], 1)
    yield "out/track_masks", followed[..., ::step, ::step].numpy()
    yield from tracks(model.finish(state, manifest["config"]["topk"]))


def run_joint(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    yield from _joint(manifest, weights, inputs) if weights else set_criterion.run(manifest, weights, inputs)


@torch.inference_mode()
def _joint(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    model = build(Mask2FormerVideo(settings(manifest["config"], joint=True)), weights)
    taps = network_taps(model)
    size, x = network_input(model, inputs)
    predictions = model(x, auxiliary=True)
    yield from video_taps(manifest, taps)
    taps.close()
    step = every(manifest, "pred_masks")
    yield "tap/bare_logits", predictions[0].logits.numpy()
    yield "tap/pred_logits", predictions[-1].logits.numpy()
    yield "tap/pred_masks", predictions[-1].masks[..., ::step, ::step].numpy()
    state = model.new_state(size)
    for image in x.split(1):
        model.link(model.segment_clip(model.encode(image), state), state)
    yield from tracks(model.finish(state, manifest["config"]["topk"]))
