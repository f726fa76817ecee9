# SPDX-License-Identifier: Apache-2.0
"""PolyphonicFormer: a short video frame by frame, or a step of training."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch

from pyvseg.layers.inference import for_inference
from pyvseg.layers.roi_embedding import pyramid_roi_align
from pyvseg.models.knet_panoptic import MergeSettings
from pyvseg.models.polyphonicformer import PolyphonicFormer, PolyphonicFormerSettings, extents
from pyvseg.models.quasi_dense import QuasiDenseSettings, similarity
from pyvseg.verify.adapters import polyphonicformer_criterion
from pyvseg.verify.adapters.kmax import MAP_RULE
from pyvseg.verify.adapters.ops_track_quasi_dense import settings as tracker_settings
from pyvseg.verify.adapters.taps import Taps
from pyvseg.verify.adapters.video_knet import BACKBONES, PARTS, load, sizes_of, stage_parts
from pyvseg.verify.compare import default_rule

DVPS = {"num_thing_classes": 8, "mask_upsample_stride": 2, "heads": 8, "max_per_img": 100, "instance_score_thr": 0.3, "overlap_thr": 0.6}


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    config = manifest["config"]
    if "parameter_order" in config:  # such cases say by their weights alone how large they are
        yield from polyphonicformer_criterion.run(load(PolyphonicFormer(settings(config, weights)), weights), weights, config, inputs)
        return
    model = for_inference(load(_Recorded(settings(config, weights)), weights), torch.float32)
    with torch.inference_mode():
        yield from _video(manifest, model, inputs["in/frames"])


def settings(config: dict, weights: dict[str, np.ndarray]) -> PolyphonicFormerSettings:
    config = DVPS | sizes_of(weights, DVPS["num_thing_classes"]) | config
    things, stuff = config["num_thing_classes"], config["num_stuff_classes"]
    if config.get("depth", "sigmoid, 0.01..80") != "sigmoid, 0.01..80":
        raise ValueError(f"depth {config['depth']!r}: only the sigmoid's, from 0.01 to 80 metres")
    convs = [key for key in weights if re.fullmatch(r"track_head\.convs\.\d+\.conv\.weight", key)]
    hidden, embedding = (len(weights[f"track_head.{name}.bias"]) for name in ("fcs.0", "fc_embed"))
    return PolyphonicFormerSettings(
        things + stuff, stuff, BACKBONES[config["backbone"]], config["channels"], config["num_thing_kernels"], config["stages"],
        config["heads"], config["ffn"], upsample=config["mask_upsample_stride"], categories=(*range(stuff, stuff + things), *range(stuff)),
        merge=MergeSettings(config["max_per_img"], config["instance_score_thr"], config["overlap_thr"]),
        tracking=tracker_settings(config["tracker"]) if "tracker" in config else QuasiDenseSettings(),
        track_convs=len(convs), track_width=len(weights[convs[0]]), track_hidden=hidden, embedding=embedding,
    )  # fmt: skip


class _Recorded(PolyphonicFormer):
    """Keeps what the last frame gave."""

    def encode(self, images):
        self.maps = super().encode(images)
        return self.maps

    def segment_clip(self, frame, state):
        self.clip, self.found = super().segment_clip(frame, state), None
        return self.clip

    def track(self, found, state):
        self.found, self.similarity, self.matched = found, similarity(state.tracks, found), super().track(found, state)
        return self.matched

    def _frame(self, clip, state):
        self.ids = self.link(clip, state)
        state.written += 1


def _video(manifest: dict, model: _Recorded, images: np.ndarray) -> Iterator[tuple]:
    state = model.new_state(*images.shape[1:3])
    every = int(re.search(r"every (\d+)th channel", manifest["notes"])[1])
    for t, image in enumerate(images):
        taps = Taps(model, [*PARTS, *stage_parts(model.stages, "stages")])
        model.step(model.encode_frames(image[None], state), state)
        taps.close()
        yield from ((f"tap/f{t}/{name}", result) for name, result in _taps(model, taps, every) if f"f{t}/{name}" in manifest["taps"])
        yield from ((f"out/f{t}/{name}", *result) for name, *result in _results(model, state, manifest))


def _taps(model: _Recorded, taps: Taps, every: int) -> Iterator[tuple]:
    for part, name in (("backbone", "backbone_c"), ("fpn", "fpn_p"), ("initial.fpn", "semantic_fpn_")):
        yield from ((f"{name}{i}", x[:, ::every]) for i, x in enumerate(taps.outputs(part, 0)))
    features, kernels, masks, semantic, depth_features, _, dense = taps.outputs("initial", 0)
    s = model.settings
    yield from (("init_x_feats", features[:, ::every]), ("init_kernels", kernels), ("init_mask_logits", masks))
    yield from (("seg_logits", semantic[:, : s.classes - s.stuff]), ("depth_feats", depth_features[:, ::every]), ("init_depth_logits", dense))
    for i, stage in enumerate(model.stages):
        classes, masks, kernels, depth_kernels = taps.outputs(f"stages.{i}", 0)
        yield from ((f"stage{i}_cls_logits", classes), (f"stage{i}_mask_logits", masks))
        yield from ((f"stage{i}_kernels", kernels), (f"stage{i}_depth_kernels", depth_kernels))
        yield f"stage{i}_depth_logits", stage.depth(torch.from_numpy(depth_kernels), torch.from_numpy(depth_features)).numpy()
    if model.found is not None:
        yield "roi_feats", pyramid_roi_align(model.maps[-4:], torch.from_numpy(_boxes(model)))[:, ::every].numpy()
        if model.similarity is not None:
            yield "match_scores", model.similarity.numpy()


def _boxes(model: _Recorded) -> np.ndarray:
    numbers = [i for i, segment in enumerate(model.clip.panoptic.segments, 1) if segment.is_thing]
    return extents(model.clip.panoptic.labels, numbers)


def _results(model: _Recorded, state, manifest: dict) -> Iterator[tuple]:
    segments, labels = model.clip.panoptic.segments, model.clip.panoptic.labels
    yield "scores", model.clip.frame.classes[0].sigmoid().numpy()
    yield "panoptic", labels.astype(np.int32), MAP_RULE
    rows = [(i, x.is_thing, x.category, x.rank, -1 if x.is_thing else x.area) for i, x in enumerate(segments, 1)]
    yield "segments", np.array(rows, np.int32).reshape(-1, 5)
    yield "segment_scores", np.array([x.score if x.is_thing else -1 for x in segments], np.float32)
    yield "depth", model.clip.depth, default_rule(manifest, "depth")._replace(mismatch=MAP_RULE.mismatch)  # where the map differs
    yield "depth_init", model.paste(model.clip.frame, np.zeros_like(labels), [], state.size)
    ids = iter(model.ids)
    yield "track", np.array([0, *(next(ids) if x.is_thing else 0 for x in segments)], np.int32)[labels], MAP_RULE
    yield "semantic", np.array([model.settings.classes, *(x.category for x in segments)], np.int32)[labels], MAP_RULE
    if model.found is not None:
        found, (kept, ids) = model.found, model.matched
        yield "rois", np.pad(_boxes(model), ((0, 0), (1, 0)))
        yield from (("track_embed", found.embeddings), ("track_boxes_in", found.boxes))
        yield from (("track_boxes", found.boxes[kept]), ("track_labels", found.labels[kept]), ("track_ids", ids))
