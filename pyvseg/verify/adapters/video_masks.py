# SPDX-License-Identifier: Apache-2.0
"""What the cases of MinVIS, CTVIS and the joint-clip Mask2Former share: network taps of a video and its tracks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pyvseg.models.frame_size import FrameSize
from pyvseg.models.mask2former import Mask2Former
from pyvseg.models.video_instances import VideoInstances
from pyvseg.verify.adapters.mask2former import BIT_RULE, every
from pyvseg.verify.adapters.taps import Taps

TAPPED_FRAMES, TAPPED_STATES = 2, 4


def network_input(model: Mask2Former, inputs: dict[str, np.ndarray]) -> tuple[FrameSize, torch.Tensor]:
    """The frames of the case as the network takes them; they are resized already."""
    frames = np.ascontiguousarray(inputs["in/frames"].transpose(0, 2, 3, 1))
    size = FrameSize.of(*frames.shape[1:3], None)
    x = size.input(frames, model.settings.mean, model.settings.std)
    return FrameSize(tuple(inputs["in/output_size"].tolist()), size.resized, size.padded), x


def video_taps(manifest: dict, taps: Taps) -> Iterator[tuple]:
    """Of one call with all frames."""
    some = slice(None, TAPPED_FRAMES)
    channel = every(manifest, "backbone maps")
    for i, tensor in enumerate(taps.outputs("backbone", 0)):
        yield f"tap/backbone.res{i + 2}", tensor[some, ::channel]
    encoder = next(name for name in taps.calls if name.startswith("pixel_decoder.layers."))
    channel = every(manifest, "encoder_tokens")
    yield "tap/pixel_decoder.encoder_tokens", taps.outputs(encoder, 0)[some, :, ::channel]
    yield "tap/pixel_decoder.mask_features", taps.outputs("pixel_decoder", 0)[0][some, ::channel]
    query = every(manifest, "decoder.layerI")
    for i, name in enumerate(name for name in taps.calls if name.startswith("decoder.layers.")):
        yield f"tap/decoder.layer{i}", taps.outputs(name, 0)[:TAPPED_STATES, ::query]


def tracks(found: VideoInstances) -> Iterator[tuple]:
    yield "out/scores", found.scores
    yield "out/labels", found.labels
    bits = [np.packbits(track.masks.reshape(len(track), -1), axis=-1) for track in found]
    yield "out/masks", np.stack(bits), BIT_RULE
