# SPDX-License-Identifier: Apache-2.0
"""Tube-Link: panoptic maps and instances of a short video, and the criterion on stored predictions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pyvseg.checkpoints import key_maps, load_into
from pyvseg.layers.backbones import ResNetSizes
from pyvseg.layers.inference import for_inference
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.tube_link import Tube, TubeLink
from pyvseg.models.tube_link_instances import TubeLinkInstances, TubeLinkInstancesSettings
from pyvseg.models.tube_link_panoptic import LinkedTube, TubeLinkPanoptic, TubeLinkPanopticSettings, TubePanoptic
from pyvseg.models.tube_link_ranking import rank_frame
from pyvseg.models.tube_link_tracker import TubeTrackerSettings
from pyvseg.models.video_instances import Selection
from pyvseg.verify.adapters import tube_link_criterion
from pyvseg.verify.adapters.mask2former import network_taps
from pyvseg.verify.adapters.taps import Taps
from pyvseg.verify.compare import Rule

PANOPTIC_RULE, BIT_RULE = Rule(mismatch=2e-3), Rule(mismatch=2e-3, bits=True)
OFFSET = 1000  # a published value is class + OFFSET * object


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    if not weights:
        yield from tube_link_criterion.run(manifest, weights, inputs)
        return
    with torch.inference_mode():
        yield from (_panoptic if manifest["config"]["kind"] == "vps" else _instances)(manifest, weights, inputs)


def _sizes(config: dict) -> dict:
    return {
        "classes": config["num_things"] + config["num_stuff"], "queries": config["num_queries"],
        "backbone": ResNetSizes(config["depth"], outputs=256 if config["depth"] >= 50 else 64), "width": config["channels"],
        "mask_width": config["channels"], "hidden": config["channels"], "heads": config["heads"], "points": config["points"],
        "encoder_layers": config["encoder_layers"], "encoder_ffn": config["encoder_ffn"], "decoder_layers": config["decoder_layers"],
        "ffn": config["decoder_ffn"], "short_side": None,
    }  # fmt: skip


def _loaded(model: TubeLink, weights: dict[str, np.ndarray]) -> TubeLink:
    state = {key: torch.from_numpy(value) for key, value in weights.items()}
    load_into(model, state, key_maps.TUBE_LINK, name="the case", ignore=key_maps.TUBE_LINK_IGNORED)
    return for_inference(model, torch.float32)


class _Recorded:
    """Keeps what every tube gave."""

    def segment_tube(self, frames):
        self.tubes.append(super().segment_tube(frames))
        return self.tubes[-1]

    def link(self, clip, state):
        self.clips.append((clip, super().link(clip, state)))
        return self.clips[-1][1]


class _RecordedPanoptic(_Recorded, TubeLinkPanoptic):
    pass


class _RecordedInstances(_Recorded, TubeLinkInstances):
    pass


def _panoptic(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    config, test, t = manifest["config"], manifest["config"]["test_cfg"], manifest["config"]["tracker"]
    tracker = TubeTrackerSettings(
        t["nms_thr_pre"], t["nms_thr_post"], t["init_score_thr"], t["addnew_score_thr"], t["match_score_thr"], t["memo_tracklet_frames"],
        t["memo_momentum"],
    )  # fmt: skip
    things = tuple(range(config["num_things"]))
    settings = TubeLinkPanopticSettings(
        **_sizes(config), things=things, clip_length=config["tube"], object_threshold=test.get("object_mask_thr", 0.8),
        overlap_threshold=test["iou_thr"], tracker=tracker,
    )  # fmt: skip
    model = _loaded(_RecordedPanoptic(settings), weights)
    model.tubes, model.clips, taps = [], [], network_taps(model)
    frames = inputs["in/frames"]
    state = model.new_state(*frames.shape[1:3])
    shown = model.step(model.encode_frames(frames, state), state, last=True)
    yield from _network(manifest, model, taps)
    for i, (clip, linked) in enumerate(model.clips):
        if i:
            yield f"tap/tube{i}_linked_query", linked.queries.numpy()
        if linked.tracked is not None:
            yield from ((f"tap/tube{i}_{name}", result) for name, result in _tracked(clip, linked))
    values = np.stack([frame.values for frame in shown])
    category, instance = values // model.divisor, values % model.divisor - 1
    yield "out/panoptic", np.where(values > 0, category + OFFSET * instance, settings.classes).astype(np.int32), PANOPTIC_RULE
    yield "out/semantic", np.where(values > 0, category, 255).astype(np.int32), PANOPTIC_RULE


def _tracked(clip: TubePanoptic, linked: LinkedTube) -> Iterator[tuple]:
    yield "track_feats", linked.embeddings.numpy()
    boxes = [_box(clip.labels[-1] == s + 1, (-1, -1, 10, 10)) for s in linked.things]
    yield "det_box_score", np.column_stack([boxes, clip.scores[linked.things].numpy()]).astype(np.float32)
    yield "det_labels", clip.classes[linked.things].numpy()
    yield "ids", np.array(linked.tracked.ids, np.int64)


def _box(mask: Tensor | np.ndarray, empty: tuple) -> tuple:
    rows, columns = np.nonzero(np.asarray(mask))
    return (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else empty


def _instances(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    config = manifest["config"]
    settings = TubeLinkInstancesSettings(**_sizes(config), tube=config["tube"], top=config["test_cfg"]["max_per_image"])
    model = _loaded(_RecordedInstances(settings), weights)
    model.tubes, model.clips, taps = [], [], network_taps(model)
    frames = inputs["in/frames"]
    state = model.new_state(FrameSize.of(*frames.shape[1:3], None))
    x = state.size.input(frames, settings.mean, settings.std)
    orders = model.link(model.segment_clip(model.encode(x), state), state) + model.flush(state)
    yield from _network(manifest, model, taps)
    yield from ((f"tap/tube{i}_permutation", order.numpy()) for i, order in enumerate(orders) if i)
    logits = state.logits / state.tubes
    yield "out/mean_cls", logits.numpy()
    probabilities = logits.softmax(-1)[:, :-1]
    pairs, rows, bits = Selection.best(probabilities, settings.top), [], []
    # Published ids are places in a list that PyTorch does not sort, and change with its version; results do not depend on them.
    place = {pair: i for i, pair in enumerate(probabilities.flatten().topk(len(pairs.scores), sorted=False).indices.tolist(), 1)}
    ids = [place[pair] for pair in (pairs.objects * settings.classes + pairs.labels).tolist()]
    for t in range(len(frames)):
        ranking = rank_frame(pairs, t, state.masks, state.size, settings.shown)
        for row in sorted(ranking.rows.tolist(), key=lambda row: int(pairs.labels[row])):  # inside a class by falling score
            mask = ranking.masks.get(int(pairs.objects[row]), np.zeros(frames.shape[1:3], bool))
            x1, y1, x2, y2 = _box(mask, (0, 0, -1, -1))
            rows.append((t, int(pairs.labels[row]), ids[row], x1, y1, x2 + 1, y2 + 1, float(ranking.scores[row])))
            bits.append(np.packbits(mask))
    yield "out/instances", np.array(rows, np.float32)
    yield "out/instance_masks", np.stack(bits), BIT_RULE


def _network(manifest: dict, model: TubeLink, taps: Taps) -> Iterator[tuple]:
    some = 4 if "every 4th query" in manifest["notes"] else 1
    for i, level in enumerate(taps.outputs("backbone", 0)):
        yield f"tap/backbone_level{i}", level[:1, ::8]
    masks, levels, _ = taps.outputs("pixel_decoder", 0)
    yield "tap/mask_feature", masks[:1, ::4]
    yield from ((f"tap/memory_level{i}", level[:1, ::4]) for i, level in enumerate(levels))
    last = len(model.decoder.layers) - 1
    for i, tube in enumerate(model.tubes):
        yield from ((f"tap/tube{i}_decoder{layer}", taps.outputs(f"decoder.layers.{layer}", i)[0]) for layer in (0, last))
        yield f"tap/tube{i}_cls", tube.logits.numpy()
        yield f"tap/tube{i}_mask", np.stack([tube.masks(t)[::some].numpy() for t in range(len(tube.pixels))])
    bare, pixels = model.decoder.decoder_norm(model.decoder.query_feat.weight), model.tubes[0].pixels
    initial = Tube(bare, model.decoder.class_embed(bare), model.decoder.mask_embed(bare), pixels)
    yield "tap/tube0_cls_initial", initial.logits.numpy()
    yield "tap/tube0_mask_initial", initial.masks(0)[None, ::some].numpy()
