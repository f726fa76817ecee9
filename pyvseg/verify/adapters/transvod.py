# SPDX-License-Identifier: Apache-2.0
"""TransVOD, TransVOD++ and TransVOD Lite on a clip, and their criterion."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pyvseg.checkpoints import key_maps, load_into
from pyvseg.layers.backbones import ResNetSizes
from pyvseg.layers.deformable_detr import Detections
from pyvseg.layers.inference import for_inference
from pyvseg.layers.pyramid import SWIN_B_PYRAMID, SwinPyramidSizes
from pyvseg.models import transvod, transvod_lite
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.transvod import TransVOD, TransVODSettings
from pyvseg.models.transvod_lite import TransVODLite, TransVODLiteSettings
from pyvseg.models.transvodpp import TransVODPlusPlus
from pyvseg.models.video_detector import MINED, Prediction, VideoDetector
from pyvseg.verify.adapters import box_criterion
from pyvseg.verify.adapters.taps import Taps
from pyvseg.verify.compare import Rule, default_rule

Arrays = dict[str, np.ndarray]
_TIE = 2e-5  # logits this near may change places


def run(manifest: dict, weights: Arrays, inputs: Arrays) -> Iterator[tuple]:
    yield from _multi_frame(TransVOD, manifest, weights, inputs) if weights else box_criterion.run(manifest, weights, inputs)


def run_plus_plus(manifest: dict, weights: Arrays, inputs: Arrays) -> Iterator[tuple]:
    yield from _multi_frame(TransVODPlusPlus, manifest, weights, inputs)


@torch.inference_mode()
def _multi_frame(kind: type[TransVOD], manifest: dict, weights: Arrays, inputs: Arrays) -> Iterator[tuple]:
    model = _build(kind(TransVODSettings(**_sizes(manifest["config"]), references=manifest["config"]["num_ref_frames"])), weights)
    taps = Taps(model, [*_names(model, "query_layers"), *_names(model, "temporal_decoders")])
    found, x = yield from _frames(manifest, model, inputs)
    frames, _ = model.encode(x)
    if isinstance(model, TransVODPlusPlus):
        yield from _fusion(model, found, frames, x.shape[-2:])
    predictions = model(x)
    scores = frames.scores[None, 1:].flatten(1, 2)
    for n, chosen in enumerate(transvod.mine(scores, model.settings.queries), 1):
        clear = _clear(scores.flatten(1).double().logit(), chosen.shape[1], manifest)
        yield f"tap/topk{n}_index", chosen.numpy(), Rule(where=clear.numpy())
    yield from _rounds(manifest, model, taps, {})
    yield from _outputs(manifest, model, predictions, inputs, {})


@torch.inference_mode()
def run_lite(manifest: dict, weights: Arrays, inputs: Arrays) -> Iterator[tuple]:
    model = _build(TransVODLite(TransVODLiteSettings(**_sizes(manifest["config"]), clip_length=manifest["config"]["num_frames"])), weights)
    taps = Taps(model, [*_names(model, "query_layers"), *_names(model, "temporal_decoders")])
    found, x = yield from _frames(manifest, model, inputs)
    predictions = model(x)
    logits = [model.detector.class_embed[-1](found.queries), *(p.logits for p in predictions[:-1])]
    clear, rows = torch.ones(logits[0].shape[:2], dtype=torch.bool), {}
    for n, (each, count) in enumerate(zip(logits, MINED), 1):
        chosen = transvod_lite.mine(each, count)
        clear = clear.gather(1, chosen) & _clear(each.amax(-1), count, manifest)  # and of queries whose place was clear before
        yield f"tap/topk{n}_index", chosen.numpy(), Rule(where=clear.numpy())
        rows |= {name: clear for name in (f"tap/tqe{n}", f"tap/tdtd{n}", f"out/{_prefix(n - 1, predictions)}pred_logits", f"out/{_prefix(n - 1, predictions)}pred_boxes")}
    yield from _rounds(manifest, model, taps, rows)
    yield from _outputs(manifest, model, predictions, inputs, rows)


def _sizes(config: dict) -> dict:
    if config["backbone"].startswith("resnet"):
        backbone = ResNetSizes(int(config["backbone"].removeprefix("resnet")), dilated=config["dilation"])
    else:
        b = SWIN_B_PYRAMID
        backbone = SwinPyramidSizes(b.width, tuple(config["swin_depths"] or b.depths), b.heads, b.window, outputs=config["hidden_dim"])
    return {
        "classes": config["num_classes"], "queries": config["num_queries"], "backbone": backbone, "hidden": config["hidden_dim"],
        "ffn": config["dim_feedforward"], "heads": config["nheads"], "points": config["dec_n_points"], "encoder_layers": config["enc_layers"],
        "decoder_layers": config["dec_layers"], "short_side": None,
    }  # fmt: skip


def _build(model: VideoDetector, weights: Arrays) -> VideoDetector:
    state = {key: torch.from_numpy(value) for key, value in weights.items()}
    names = key_maps.TRANSVOD_V1 if type(model) is TransVOD else key_maps.TRANSVOD
    load_into(model, state, names, name="the case", ignore=key_maps.TRANSVOD_IGNORED)
    return for_inference(model, torch.float32)


def _names(model: nn.Module, part: str) -> list[str]:
    return [f"{part}.{i}" for i in range(len(getattr(model, part)))]


def _frames(manifest: dict, model: VideoDetector, inputs: Arrays) -> Iterator[tuple]:
    """The taps of the single frames; returns what they show, and the network's input."""
    images, s = inputs["in/frames"], model.settings
    x = FrameSize(images.shape[1:3], images.shape[1:3], images.shape[1:3]).input(images, s.mean, s.std)
    taps = Taps(model, ["backbone", "detector.input_proj"])
    found = model.detections(x)
    taps.close()

    channel = int(re.search(r"'backbone' keeps every (\d+)", manifest["notes"])[1])
    some = slice(2 if "keep frames 0 and 1" in manifest["notes"] else None)
    yield "tap/backbone", taps.outputs("backbone", 0)[-1][some, ::channel]
    code = found.position - model.detector.level_embed
    yield "tap/pos", code.T.unflatten(1, found.grid)[None].numpy()
    yield "tap/input_proj", taps.outputs("detector.input_proj", 0)[some]
    yield "tap/memory", found.memory[some].numpy()
    yield "tap/decoder_hs_last", found.queries[some].numpy()
    yield "tap/decoder_ref_last", found.boxes.numpy()
    return found, x


def _fusion(model: TransVODPlusPlus, found: Detections, frames: transvod.Frames, size: tuple[int, int]) -> Iterator[tuple]:
    rois = model.rois(found, size)
    parts = ("cur", 0, found.memory, frames.current), ("ref1", 1, found.memory + found.position, frames.reference)
    for name, t, pixels, fused in parts:
        yield f"tap/rois_{name}", torch.cat([torch.zeros(rois.shape[1], 1), rois[t]], 1).numpy()
        features = model.roi_features(pixels, found, size)[t, ::10]
        yield f"tap/roi_feat_{name}", features.transpose(1, 2).unflatten(2, (7, 7)).numpy()
        yield f"tap/qrf_{name}", fused[t : t + 1].numpy()


def _clear(logits: torch.Tensor, count: int, manifest: dict) -> torch.Tensor:
    """Which of the `count` best of logits (B, N) have their place beyond doubt (B, count): no neighbour is nearer than rounding
    reaches, which two runs of the published code show."""
    best = logits.topk(min(count + 1, logits.shape[1])).values
    apart = best[:, :-1] - best[:, 1:] > max(2 * manifest.get("thread_difference", 0), _TIE)
    apart = F.pad(apart, (1, count + 1 - best.shape[1]), value=True)
    return apart[:, :-1] & apart[:, 1:]


def _judged(manifest: dict, name: str, result: np.ndarray, clear: torch.Tensor | None) -> tuple:
    """A result whose rows (B, N) are compared where their place is clear."""
    if clear is None:
        return name, result
    where = np.broadcast_to(clear.numpy().reshape(*result.shape[:-1], 1), result.shape)
    thinned = manifest.get("thinned", {})
    every = thinned[name]["every"] if name in thinned else None
    return name, result, default_rule(manifest, name)._replace(where=where if every is None else where.reshape(-1)[::every])


def _rounds(manifest: dict, model: VideoDetector, taps: Taps, rows: dict[str, torch.Tensor]) -> Iterator[tuple]:
    decoders = _names(model, "temporal_decoders")
    names = {f"tap/tqe{n}": name for n, name in enumerate(_names(model, "query_layers"), 1)}
    names |= {f"tap/tdtd{n if len(decoders) > 1 else ''}": name for n, name in enumerate(decoders, 1)}
    for tap, name in names.items():
        yield _judged(manifest, tap, taps.outputs(name, 0), rows.get(tap))


def _prefix(i: int, predictions: list[Prediction]) -> str:
    return f"aux{i}_" if i < len(predictions) - 1 else ""


def _outputs(manifest: dict, model: VideoDetector, predictions: list[Prediction], inputs: Arrays, rows: dict[str, torch.Tensor]) -> Iterator[tuple]:
    for i, prediction in enumerate(predictions):
        for part, result in zip(("logits", "boxes"), prediction):
            name = f"out/{_prefix(i, predictions)}pred_{part}"
            yield _judged(manifest, name, result.numpy(), rows.get(name))
    final, sizes = predictions[-1], inputs["in/orig_size"].tolist()
    found = [model.results(Prediction(*(part[t : t + 1] for part in final)), tuple(size))[0] for t, size in enumerate(sizes)]
    scores, labels, boxes = (torch.stack(part) for part in zip(*found))
    clear = _clear(final.logits.flatten(1), scores.shape[1], manifest)
    yield "out/top100_scores", scores.numpy()
    yield "out/top100_labels", labels.numpy(), Rule(where=clear.numpy())
    yield _judged(manifest, "out/top100_boxes", boxes.numpy(), clear)
