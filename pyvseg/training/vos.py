# SPDX-License-Identifier: Apache-2.0
"""One training pass of STCN and PCVOS: the first frame's masks are given, each clip is segmented from what memory holds."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvseg import ops
from pyvseg.models.stcn import STCN
from pyvseg.training.losses import aggregated_logits


def training_pass(model: STCN, frames: Tensor, masks: Tensor, selector: Tensor, clips: list[list[int]]) -> dict[int, Tensor]:
    """Segment every clip and return logits (B, O + 1, H, W) by frame index.

    frames    (B, T, 3, H, W) normalised
    masks     (B, O, H, W) float, the objects in frame 0
    selector  (B, O) 1 where the object exists
    clips     frame indices; after each clip its last frame enters memory with the predicted masks, gradients included
    """
    features = _Features(model, frames)
    keys = [features.keys[:, 0]]
    values = [_values(model, features, 0, masks)]
    logits = {}
    for clip in clips:
        readout = ops.memory_read(torch.cat(keys, 1), torch.cat(values, 2), features.keys[:, clip].flatten(1, 2), top_k=None)
        probabilities = _decode(model, features, clip, readout) * selector[:, :, None, None, None]
        scores = aggregated_logits(probabilities)
        logits.update({t: scores[:, :, i] for i, t in enumerate(clip)})
        if clip is not clips[-1]:
            keys.append(features.keys[:, clip[-1]])
            values.append(_values(model, features, clip[-1], scores[:, :, -1].softmax(1)[:, 1:]))
    return logits


class _Features:
    """Frame features of a batch with (B, T) as the first axes."""

    def __init__(self, model: STCN, frames: Tensor) -> None:
        b, t = frames.shape[:2]
        clip = model.features(frames.flatten(0, 1))
        self.images, self.grid = frames, clip.grid
        for name in ("keys", "f16", "thin", "f8", "f4", "refine"):
            tensor = getattr(clip, name)
            setattr(self, name, None if tensor is None else tensor.unflatten(0, (b, t)))


def _values(model: STCN, features: _Features, t: int, masks: Tensor) -> Tensor:
    """Soft masks (B, O, H, W) of frame t -> values (B, O, h * w, CV)."""
    b, o = masks.shape[:2]
    others = masks.sum(1, keepdim=True) - masks
    image, f16 = (x[:, t].repeat_interleave(o, 0) for x in (features.images, features.f16))
    values = model.value_encoder.batched(image, masks.flatten(0, 1), others.flatten(0, 1), f16)
    return values.flatten(2).transpose(1, 2).unflatten(0, (b, o))


def _decode(model: STCN, features: _Features, clip: list[int], readout: Tensor) -> Tensor:
    """Readouts (B, O, L * h * w, CV) -> probabilities (B, O, L, H, W)."""
    b, o = readout.shape[:2]
    readout = readout.unflatten(2, (len(clip), *features.grid))
    if features.refine is not None:
        readout = model.icr(readout, model.icr.attention(features.refine[:, clip].permute(0, 1, 3, 4, 2)))
    terms = model.decoder.of_frame(*(x[:, clip].flatten(0, 1) for x in (features.thin, features.f8, features.f4)))
    terms = [x.unflatten(0, (b, 1, -1)).expand(b, o, *(-1,) * 4).flatten(0, 2) for x in terms]
    logits = model.decoder(readout.flatten(0, 2).permute(0, 3, 1, 2), terms)
    return logits.unflatten(0, (b, o, -1)).sigmoid()
