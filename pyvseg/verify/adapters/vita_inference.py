# SPDX-License-Identifier: Apache-2.0
"""VITA and GenVIS on a short video."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pyvseg.layers.backbones import ResNetSizes
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.genvis import GenVIS, GenVISSettings
from pyvseg.models.mask2former import Mask2Former
from pyvseg.models.video_instances import VideoInstances
from pyvseg.models.vita import VITA, VITASettings
from pyvseg.verify.adapters.mask2former import MASK_RULE, build, every
from pyvseg.verify.adapters.taps import Taps
from pyvseg.video.resize import resize_bilinear


def settings(config: dict, weights: dict[str, np.ndarray], kind: type = VITASettings) -> VITASettings:
    stem, block = (weights[f"backbone.{name}.weight"].shape[0] for name in ("stem.conv1", "res2.0.conv1"))
    backbone = ResNetSizes(50, stem, weights["backbone.res2.0.conv3.weight"].shape[0], block)
    pixel, image, video = (config[name] for name in ("pixel_decoder", "image_decoder", "video_module"))
    more = {"clip_length": config["clip_len"]} if kind is GenVISSettings else {}
    return kind(
        classes=config["num_classes"], queries=image["queries"], backbone=backbone, width=config["conv_dim"],
        mask_width=config["mask_dim"], hidden=image["hidden"], heads=image["heads"], points=pixel["points"],
        encoder_layers=pixel["layers"], encoder_ffn=pixel["ffn"], decoder_layers=image["layers"], ffn=image["ffn"],
        short_side=config.get("min_size"), video_queries=video["queries"], video_heads=video["heads"], video_ffn=video["ffn"],
        video_encoder_layers=video["enc_layers"], video_layers=video["dec_layers"], window=config["enc_window"], top=config["topk"], **more,
    )  # fmt: skip


@torch.inference_mode()
def run_vita(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    model = build(VITA(settings(manifest["config"], weights)), weights)
    frames = inputs["in/frames"]
    taps = _taps(model)
    encoded = _encoded(model)
    state, found = _drive(model, frames, together=len(frames))
    yield from _detector_taps(manifest, model, taps, frames)
    yield "tap/enc_tokens", encoded[0][0].numpy()
    for i in range(len(model.video.layers)):
        yield f"tap/decoder_layer{i}", taps.outputs(f"video.layers.{i}", -1)[0]
    last = taps.outputs(f"video.layers.{len(model.video.layers) - 1}", -1)[0]
    queries = model.video.decoder_norm(torch.from_numpy(last))
    embeddings = model.video.mask_embed(queries)
    logits = model.video.class_embed(queries)
    yield "tap/pred_logits", logits.numpy()
    yield "tap/mask_embed", embeddings.numpy()
    features = torch.stack([state.masks[t].permute(2, 0, 1) for t in range(len(frames))])
    yield from _tracks(found, logits.softmax(-1), lambda rows: torch.einsum("nc,tchw->nthw", embeddings[rows], features))


@torch.inference_mode()
def run_genvis(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    model = build(GenVIS(settings(manifest["config"], weights, GenVISSettings)), weights)
    frames, length = inputs["in/frames"], manifest["config"]["clip_len"]
    taps = _taps(model)
    clips, encoded = [], _encoded(model)
    segment_clip = model.segment_clip
    model.segment_clip = lambda features, state: clips.append((segment_clip(features, state), features)) or clips[-1][0]
    state, found = _drive(model, frames, together=length)
    yield from _detector_taps(manifest, model, taps, frames)
    yield "tap/enc_tokens", torch.cat(encoded, 1)[0].numpy()
    count = len(clips)
    yield "tap/decoder_in", np.concatenate([taps.inputs("video.layers.0", i)[0] for i in range(count)])
    for i in range(len(model.video.layers)):
        yield f"tap/decoder_layer{i}", np.concatenate([taps.outputs(f"video.layers.{i}", n) for n in range(count)])
    yield "tap/memory_k", state.memory.keys[:count, 0].numpy()
    yield "tap/memory_v", state.memory.values[:count, 0].numpy()
    logits = torch.stack([clip.logits for clip, _ in clips])
    yield "tap/pred_logits", logits.numpy()
    embeddings = [model.video.mask_embed(model.video.decoder_norm(clip.carried))[0] for clip, _ in clips]
    yield "tap/mask_embed", torch.stack(embeddings).numpy()
    masks = torch.cat([clip.masks for clip, _ in clips]).transpose(0, 1)
    yield from _tracks(found, logits.softmax(-1).amax(0), lambda rows: masks[rows])


def _taps(model: VITA) -> Taps:
    layers = [f"video.layers.{i}" for i in range(len(model.video.layers))]
    return Taps(model, ["backbone", "pixel_decoder", "decoder.decoder_norm", "video.vita_mask_features", *layers])


def _encoded(model: VITA) -> list[torch.Tensor]:
    """Will hold what the video module's encoder returns, call by call."""
    results: list[torch.Tensor] = []
    encode = model.video.encode
    model.video.encode = lambda tokens: results.append(encode(tokens)) or results[-1]
    return results


def _drive(model: VITA, frames: np.ndarray, together: int) -> tuple[object, VideoInstances]:
    s = model.settings
    size = FrameSize.of(*frames.shape[1:3], s.short_side, s.long_side)
    state = model.new_state(size)
    for start in range(0, len(frames), together):
        features = model.encode(size.input(frames[start : start + together], s.mean, s.std))
        model.link(model.segment_clip(features, state), state)
    return state, model.finish(state)


def _detector_taps(manifest: dict, model: Mask2Former, taps: Taps, frames: np.ndarray) -> Iterator[tuple]:
    """Of the image model: pixels of frame 0, queries of all frames."""
    s = model.settings
    yield "tap/resized", resize_bilinear(torch.from_numpy(frames), FrameSize.of(*frames.shape[1:3], s.short_side, s.long_side).resized).numpy()
    steps = _steps(manifest)
    for i, tensor in enumerate(taps.outputs("backbone", 0)):
        yield f"tap/res{i + 2}", tensor[0, :: steps[0]]
    mask_features, levels, finest = taps.outputs("pixel_decoder", 0)
    for name, level in zip(("s32", "s16", "s8"), levels):
        yield f"tap/pixel_{name}", level[0, :: steps[1]]
    yield "tap/fpn_s4", finest[0, :: steps[2]]
    yield "tap/clip_mask_features", taps.outputs("video.vita_mask_features", 0)[0, :: steps[2]]
    last = len(model.decoder.layers)  # of the norm's calls in a batch, the first is that of the bare queries
    batches = len(taps.calls["decoder.decoder_norm"]) // (last + 1)
    queries = np.concatenate([taps.outputs("decoder.decoder_norm", n * (last + 1) + last) for n in range(batches)])
    tensor = torch.from_numpy(queries)
    yield "tap/frame_queries", queries
    yield "tap/frame_logits", model.decoder.class_embed(tensor).numpy()
    masks = torch.einsum("qc,chw->qhw", model.decoder.mask_embed(tensor[0]), torch.from_numpy(mask_features[0]))
    yield "tap/frame_masks", masks[:: every(manifest, r"frame_masks \(frame 0,")].numpy()


def _steps(manifest: dict) -> list[int]:
    """Every how many channels res*, pixel_* and fpn_s4 are stored."""
    note = next(n for n in manifest["notes"] if n.startswith("Taps of pixels"))
    return [int("".join(c for c in word if c.isdigit())) for word in note.split() if word[0].isdigit() and word.endswith("th")] or [1, 1, 1]


def _tracks(found: VideoInstances, probabilities: torch.Tensor, masks) -> Iterator[tuple]:
    """Sorted by query, then class, as the case has them."""
    order = np.lexsort((found.labels, found.objects))
    rows, labels = found.objects[order], found.labels[order]
    yield "tap/class_prob", probabilities[rows, labels].numpy()
    yield "tap/mask_logits", masks(torch.from_numpy(rows)).numpy()
    yield "out/query", rows
    yield "out/label", labels
    yield "out/score", found.scores[order]
    yield "out/masks", np.stack([found[i].masks for i in order]).astype(np.uint8), MASK_RULE
