# SPDX-License-Identifier: Apache-2.0
"""Mask2Former: the image model with its three kinds of results, the joint-clip video model, and the criterion."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch

from pyvseg.checkpoints import key_maps, load_into
from pyvseg.layers.backbones import ResNetSizes, SwinSizes
from pyvseg.layers.inference import for_inference
from pyvseg.layers.mask_decoder import Prediction
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.image_results import instances, panoptic, semantic
from pyvseg.models.mask2former import Mask2Former, Mask2FormerSettings
from pyvseg.verify.adapters import set_criterion
from pyvseg.verify.adapters.taps import Taps
from pyvseg.verify.compare import Rule

MASK_RULE, BIT_RULE = Rule(mismatch=1e-3), Rule(mismatch=1e-3, bits=True)


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    if not weights:
        yield from set_criterion.run(manifest, weights, inputs)
        return
    model = build(Mask2Former(settings(manifest["config"])), weights)
    taps = network_taps(model)
    images = [inputs[f"in/image.{i}"].transpose(1, 2, 0) for i in range(len(inputs["in/output_size"]))]
    sizes = [FrameSize.of(*image.shape[:2], None) for image in images]
    with torch.inference_mode():
        predictions = model(_batch(model, images, sizes), auxiliary=True)
    yield from _image_taps(manifest, taps, predictions[0])
    final = predictions[-1]
    yield "out/pred_logits", final.logits.numpy()
    yield "out/pred_masks", final.masks.numpy()
    padded = tuple(max(size.padded[axis] for size in sizes) for axis in (0, 1))
    for i, (size, output) in enumerate(zip(sizes, inputs["in/output_size"].tolist())):
        size = FrameSize(tuple(output), size.resized, padded)
        masks = size.to_source(size.upsample(final.masks[i : i + 1]))[0]
        yield from _results(manifest, i, final.logits[i], masks)


def settings(config: dict, **more) -> Mask2FormerSettings:
    """The sizes that the config of a case of this family gives."""
    backbone = config["backbone"]
    if backbone["name"] == "D2SwinTransformer":
        sizes = SwinSizes(backbone["embed"], tuple(backbone["depths"]), tuple(backbone["heads"]), backbone["window"], backbone["mlp_ratio"])
    else:
        sizes = ResNetSizes(backbone["depth"], backbone["stem"], backbone["res2_out"], backbone["width"])
    return Mask2FormerSettings(
        classes=config["classes"], queries=config["queries"], backbone=sizes, width=config["convs_dim"], mask_width=config["mask_dim"],
        hidden=config["hidden"], heads=config["heads"], points=config["points"], encoder_layers=config["encoder_layers"],
        encoder_ffn=config["encoder_ffn"], decoder_layers=config["decoder_layers"], ffn=config["ffn"], short_side=None,
        mean=tuple(config["pixel_mean"]), std=tuple(config["pixel_std"]), **more,
    )  # fmt: skip


def build(model: Mask2Former, weights: dict[str, np.ndarray]) -> Mask2Former:
    state = {key: torch.from_numpy(value) for key, value in weights.items()}
    load_into(model, state, key_maps.MASK2FORMER, name="the case", ignore=key_maps.MASK2FORMER_IGNORED)
    return for_inference(model, torch.float32)


def network_taps(model: Mask2Former) -> Taps:
    encoder = [f"pixel_decoder.layers.{len(model.pixel_decoder.layers) - 1}"]
    decoder = [f"decoder.layers.{i}" for i in range(len(model.decoder.layers))]
    return Taps(model, ["backbone", "pixel_decoder", *encoder, *decoder])


def every(manifest: dict, what: str) -> int:
    """k where the notes say of `what` (a regular expression) that every k-th is stored, else 1."""
    found = re.search(what + r"[^;.]*?every (\d+)", " ".join(manifest["notes"]))
    return int(found[1]) if found else 1


def _batch(model: Mask2Former, images: list[np.ndarray], sizes: list[FrameSize]) -> torch.Tensor:
    """Images of different sizes in one batch, all padded to the largest."""
    height, width = (max(size.padded[axis] for size in sizes) for axis in (0, 1))
    s = model.settings
    return torch.cat(
        [FrameSize(size.source, size.resized, (height, width)).input(image[None], s.mean, s.std) for image, size in zip(images, sizes)]
    )


def _image_taps(manifest: dict, taps: Taps, bare: Prediction) -> Iterator[tuple]:
    channel = every(manifest, "backbone maps")
    for i, tensor in enumerate(taps.outputs("backbone", 0)):
        yield f"tap/backbone.res{i + 2}", tensor[:, ::channel]
    encoder = next(name for name in taps.calls if name.startswith("pixel_decoder.layers."))
    yield "tap/pixel_decoder.encoder_tokens", taps.outputs(encoder, 0)[..., :: every(manifest, "encoder_tokens")]
    yield "tap/pixel_decoder.mask_features", taps.outputs("pixel_decoder", 0)[0][:, :: every(manifest, "pixel_decoder.mask_features")]
    yield "tap/decoder.bare.logits", bare.logits.numpy()
    yield "tap/decoder.bare.masks", bare.masks.numpy()[:, :: every(manifest, "masks:")]
    for i, name in enumerate(name for name in taps.calls if name.startswith("decoder.layers.")):
        yield f"tap/decoder.blocked{i}", np.packbits(taps.inputs(name, 0)[4] < 0, axis=-1)
        yield f"tap/decoder.layer{i}", taps.outputs(name, 0)


def _results(manifest: dict, i: int, logits: torch.Tensor, masks: torch.Tensor) -> Iterator[tuple]:
    config = manifest["config"]
    things = frozenset(config["thing_classes"])
    step = every(manifest, r"out/sem_seg\.I")
    yield f"out/sem_seg.{i}", semantic(logits, masks)[:, ::step, ::step].numpy()
    labels, segments = panoptic(
        logits, masks, things, object_threshold=config["object_mask_threshold"], overlap_threshold=config["overlap_threshold"]
    )
    yield f"out/panoptic.{i}", labels.numpy(), MASK_RULE
    yield f"out/segments.{i}", np.array(segments, np.int64).reshape(-1, 3)
    found = instances(logits, masks, config["detections_per_image"], things)
    yield f"out/instance_scores.{i}", found.scores.numpy()
    yield f"out/instance_classes.{i}", found.labels.numpy()
    if "packbits along the last axis" in " ".join(manifest["notes"]):
        yield f"out/instance_masks.{i}", np.packbits(found.masks.flatten(1).numpy(), axis=-1), BIT_RULE
    else:
        yield f"out/instance_masks.{i}", found.masks.numpy().astype(np.uint8), MASK_RULE
