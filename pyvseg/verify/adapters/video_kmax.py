# SPDX-License-Identifier: Apache-2.0
"""Video-kMaX: a short video through clips of two frames and, where stored, frame by frame; the criterion on stored predictions."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch

from pyvseg.models.kmax_panoptic import ClipPanoptic, PanopticSettings
from pyvseg.models.kmax_size import KMaXSize
from pyvseg.models.panoptic_linking import Linked, LinkSettings
from pyvseg.models.video_kmax import VideoKMaX, VideoKMaXSettings, VideoKMaXState
from pyvseg.verify.adapters import kmax_criterion, ops_hila_mb
from pyvseg.verify.adapters.kmax import MAP_RULE, build, network_settings, network_taps
from pyvseg.verify.adapters.ops_hila_mb import memory


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    config = manifest["config"]
    if "runs" in config:
        yield from ops_hila_mb.run(manifest, weights, inputs)
    if "video" in config:
        yield from kmax_criterion.run(manifest, weights, inputs)
    for mode, prefix in (("near_online", ""), ("online", "online/")):
        if mode in config:
            model = build(VideoKMaX(_settings(config, config[mode])), weights)
            with torch.inference_mode():
                yield from _video(manifest, model, inputs["in/frames"], prefix)


def _settings(config: dict, mode: dict) -> VideoKMaXSettings:
    return VideoKMaXSettings(
        **network_settings(config, unactivated=True), clip_length=mode["T"],
        panoptic=PanopticSettings(mode["OBJECT_MASK_THRESHOLD"], mode["CLASS_THRESHOLD_THING"]),
        linking=LinkSettings(confidence=mode["LAMB_CONF_THRES"], buffer=mode["LAMB_BUFFER_SIZE"], divisor=config["label_divisor"]),
    )  # fmt: skip


class _Recorded(VideoKMaX):
    """Keeps what every clip gave."""

    def segment_clip(self, pixels, state):
        self.predictions.append(self.decoder(pixels)[0])
        return super().segment_clip(pixels, state)

    def link(self, clip, state):
        linked = super().link(clip, state)
        self.clips.append((state.start, clip, linked, list(memory(state.links))))
        return linked


def _video(manifest: dict, model: VideoKMaX, frames: np.ndarray, prefix: str) -> Iterator[tuple]:
    images = np.ascontiguousarray(frames.transpose(0, 2, 3, 1))
    s = model.settings
    size = KMaXSize(tuple(manifest["config"]["orig_size"]), images.shape[1:3], s.image_size)
    given = KMaXSize(images.shape[1:3], images.shape[1:3], s.image_size)
    x = given.input(images, s.mean, s.std)
    tap = f"tap/{prefix}clip"
    yield from ((f"{tap}0/{name}", result) for name, result in network_taps(model, x[: s.clip_length], lambda name: _step(manifest, name)))
    model.__class__, model.predictions, model.clips = _Recorded, [], []
    state = VideoKMaXState(size)
    shown = [frame for image in x.split(1) for frame in model.step([model.encode(image)], state)]
    shown += model.step([], state, last=True)
    while state.pixels:  # published: clips that write nothing any more are linked too
        model._clip(state, len(x))
    for prediction, (start, clip, linked, held) in zip(model.predictions, model.clips):
        yield from ((f"{tap}{start}/{name}", *result) for name, *result in _clip_taps(manifest, prediction, clip, linked, s.linking.divisor))
        yield from ((f"{tap}{start}/memory.{part}", result) for part, result in held)
    yield f"out/{prefix.replace('/', '_')}panoptic", np.stack([frame.values for frame in shown]), MAP_RULE


def _clip_taps(manifest: dict, prediction, clip: ClipPanoptic, linked: Linked, divisor: int) -> Iterator[tuple]:
    yield "pred_logits", prediction.logits.numpy()
    yield "pred_masks", torch.cat([prediction.masks(t) for t in range(len(clip.labels))])[:, :: _step(manifest, "pred_masks")].numpy()
    yield "cluster_feature", prediction.embeddings.mT.numpy()
    yield "segments", np.array([(i, s.category, s.is_thing) for i, s in enumerate(clip.segments, 1)], np.int32)
    own = np.array([0] + [s.category * divisor + i for i, s in enumerate(clip.segments, 1)], np.int32)
    flat = clip.labels.reshape(-1, clip.labels.shape[-1])
    yield "panoptic_clip", own[flat], MAP_RULE
    yield "panoptic_tracked", linked.tracked[flat], MAP_RULE
    if linked.decoded is not None:
        for name, result in zip(("memory_score", "memory_score_rows", "memory_score_cols"), linked.decoded):
            yield name, np.array(result, np.float32 if name == "memory_score" else np.int32)


def _step(manifest: dict, name: str) -> int:
    """Every how many-th channel, or query, of a tap is stored."""
    _, subsampled, rest = manifest["notes"].partition("SUBSAMPLING")
    if not subsampled:
        return 4 if name == "pixel3" else 1
    found = re.search(rf"\b{re.sub('[0-9]+[.]', 'K.', name) if '.' in name else name} (\d+)", rest)
    return int(found[1]) if found else 1
