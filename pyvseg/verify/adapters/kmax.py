# SPDX-License-Identifier: Apache-2.0
"""kMaX-DeepLab on images; what its cases share with those of Video-kMaX."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from pyvseg.checkpoints import key_maps, load_into
from pyvseg.layers.inference import for_inference
from pyvseg.layers.kmax_backbones import ResNetSizes
from pyvseg.layers.kmax_pixel_decoder import resize
from pyvseg.layers.normed import linear_weights
from pyvseg.models.kmax import KMaX, KMaXSettings
from pyvseg.models.kmax_image_results import ImagePanopticSettings, instances, panoptic, semantic
from pyvseg.models.kmax_size import KMaXImageSize, KMaXSize
from pyvseg.verify.compare import Rule

MAP_RULE = Rule(mismatch=1e-3)
AREA_RULE = Rule(mismatch=0.2)  # a mask may gain or lose single pixels at the threshold

PUBLISHED = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
    "MODEL.KMAX_DEEPLAB.PIXEL_DEC.DEC_LAYERS": [1, 5, 1, 1],
    "MODEL.KMAX_DEEPLAB.PIXEL_DEC.DEC_CHANNELS": [512, 256, 128, 64],
    "MODEL.KMAX_DEEPLAB.TRANS_DEC.DEC_LAYERS": [2, 2, 2],
    "MODEL.KMAX_DEEPLAB.TRANS_DEC.NUM_OBJECT_QUERIES": 128,
}


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    config = manifest["config"]
    model = build(KMaX(KMaXSettings(**network_settings(config, unactivated=False))), weights)
    s = model.settings
    images = [inputs[f"in/image{i}"].transpose(1, 2, 0)[None] for i in range(len(config["orig_sizes"]))]
    x = torch.cat([KMaXSize(i.shape[1:3], i.shape[1:3], s.image_size).input(np.ascontiguousarray(i), s.mean, s.std) for i in images])
    with torch.inference_mode():
        yield from ((f"tap/{name}", result) for name, result in network_taps(model, x, lambda name: 1, images=True))
        final, layers = model(x, auxiliary=True)
        yield "tap/pred_logits", final.logits.numpy()
        yield "tap/pred_masks", final.masks(0).numpy()
        yield "tap/pixel_feature", final.features(0)[:, ::8].numpy()
        for i, layer in enumerate(layers):
            full = resize(layer.masks[0], final.pixels[0].shape[2:], final.pixels[0].shape[2])
            yield f"tap/aux{i}.pred_masks", full[:, ::4, ::2, ::2].numpy()
        for i, source in enumerate(config["orig_sizes"]):
            size = KMaXImageSize(tuple(source), images[i].shape[1:3], s.image_size)
            yield from ((f"out/{name}{i}", *result) for name, *result in _results(config, final.logits[i], final.masks(0)[i], size))


def _results(config: dict, logits: torch.Tensor, masks: torch.Tensor, size: KMaXImageSize) -> Iterator[tuple]:
    things = frozenset(config["things"])
    pixel = config["PIXEL_CONFIDENCE_THRESHOLD"]
    rules = ImagePanopticSettings(pixel, config["CLASS_THRESHOLD_THING"], config["CLASS_THRESHOLD_STUFF"], config["OVERLAP_THRESHOLD"])
    labels, segments = panoptic(logits, masks, things, size, rules)
    yield "panoptic", labels.numpy(), MAP_RULE
    yield "segments", np.array([(s.id, s.category, s.is_thing) for s in segments], np.int32).reshape(-1, 3)
    yield "semantic", semantic(logits, masks, size).numpy()
    found = instances(logits, masks, size, things, config["overrides"]["TEST.DETECTIONS_PER_IMAGE"], pixel)
    yield "instance_scores", found.scores.numpy()
    yield "instance_classes", found.labels.int().numpy()
    yield "instance_area", found.masks.flatten(1).sum(1).int().numpy(), AREA_RULE


def network_settings(config: dict, *, unactivated: bool) -> dict:
    """Arguments of `KMaXSettings`."""
    given = PUBLISHED | config["overrides"]
    stem, outputs, width = (given[f"MODEL.RESNETS.{name}"] for name in ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP"))
    decoder, transformer = "MODEL.KMAX_DEEPLAB.PIXEL_DEC.", "MODEL.KMAX_DEEPLAB.TRANS_DEC."
    return {
        "classes": config["num_classes"], "things": tuple(config["things"]), "backbone": ResNetSizes(50, stem, outputs, width, unactivated),
        "queries": given[transformer + "NUM_OBJECT_QUERIES"], "image_size": tuple(given["INPUT.IMAGE_SIZE"]),
        "widths": tuple(given[decoder + "DEC_CHANNELS"]), "blocks": tuple(given[decoder + "DEC_LAYERS"]),
        "layers": tuple(given[transformer + "DEC_LAYERS"]),
    }  # fmt: skip


def build(model: KMaX, weights: dict[str, np.ndarray]) -> KMaX:
    state = linear_weights({key: torch.from_numpy(value) for key, value in weights.items()})
    load_into(model, state, key_maps.KMAX, name="the case", ignore=key_maps.KMAX_IGNORED)
    return for_inference(model, torch.float32)


def network_taps(model: KMaX, x: torch.Tensor, step: Callable[[str], int], *, images: bool = False) -> Iterator[tuple]:
    """Stages of one clip, or of images on their own. Queries and assignments are those of the fast way, masks and classes come besides."""
    features = model.backbone(x)
    maps = model.pixel_decoder(features)
    for name, tensors in (("res", dict(enumerate(features, 2))), ("pixel", dict(enumerate(maps)))):
        yield from ((f"{name}{i}", tensor[:, :: step(f"{name}{i}")].numpy()) for i, tensor in tensors.items())
    encoded = model.decoder.encode(maps)
    frames = [encoded] if images else encoded.split()
    fast, dense = model.decoder(frames)[1], model.decoder(frames, auxiliary=True)[1]
    for i, (result, predicted) in enumerate(zip(fast, dense)):
        yield f"layer{i}.query", result.queries.mT.numpy()
        yield f"layer{i}.class_logits", predicted.prediction.logits.numpy()
        yield f"layer{i}.mask_logits", torch.cat(predicted.masks)[:, :: step(f"layer{i}.mask_logits")].numpy()
        yield f"layer{i}.assign", torch.cat(result.assign).to(torch.uint8).numpy()
