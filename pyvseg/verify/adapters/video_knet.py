# SPDX-License-Identifier: Apache-2.0
"""Video K-Net: a short video frame by frame, or for instances as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from pyvseg.checkpoints import key_maps, load_into, map_keys
from pyvseg.layers.backbones import RESNETS, ResNetSizes
from pyvseg.layers.inference import for_inference
from pyvseg.layers.resnet import BasicBlock, Bottleneck
from pyvseg.models.categories import KITTI_STEP_THINGS
from pyvseg.models.fitting import way
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.knet import KNet
from pyvseg.models.knet_panoptic import MergeSettings
from pyvseg.models.quasi_dense import QuasiDenseSettings, similarity
from pyvseg.models.video_knet import VideoKNet, VideoKNetSettings, things_first
from pyvseg.models.video_knet_instances import VideoKNetClip, VideoKNetInstances, VideoKNetInstancesSettings
from pyvseg.verify.adapters import video_knet_criterion
from pyvseg.verify.adapters.kmax import MAP_RULE
from pyvseg.verify.adapters.ops_track_quasi_dense import settings as tracker_settings
from pyvseg.verify.adapters.taps import Taps

BACKBONES = {f"resnet{depth}": ResNetSizes(depth, outputs=64 if depth < 50 else 256) for depth in RESNETS}
KITTI_STEP = {"num_thing_classes": 2, "mask_upsample_stride": 4, "heads": 8, "max_per_img": 100, "instance_score_thr": 0.25, "overlap_thr": 0.6}


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    config = manifest["config"]
    if "loss" in config:  # such cases say by their weights alone how large they are
        model = load(VideoKNet(settings(KITTI_STEP | sizes_of(weights, KITTI_STEP["num_thing_classes"]), weights)), weights)
        yield from video_knet_criterion.run(model, weights, config, inputs)
        return
    model = for_inference(load(_Recorded(settings(config, weights)), weights), torch.float32)
    with torch.inference_mode():
        yield from _video(manifest, model, inputs["in/frames"])


def sizes_of(weights: dict[str, np.ndarray], things: int) -> dict:
    kernels, classes = (weights[f"rpn_head.{name}.weight"] for name in ("init_kernels", "conv_seg"))
    blocks = tuple(len({key.split(".")[2] for key in weights if key.startswith(f"backbone.layer{i}.")}) for i in range(1, 5))
    kind = Bottleneck if "backbone.layer1.0.conv3.weight" in weights else BasicBlock
    return {
        "backbone": next(f"resnet{depth}" for depth, sizes in RESNETS.items() if sizes == (kind, blocks)), "channels": kernels.shape[1],
        "num_thing_kernels": len(kernels), "num_stuff_classes": len(classes) - things,
        "stages": len({key.split(".")[2] for key in weights if key.startswith("roi_head.mask_head.")}),
        "ffn": len(weights["roi_head.mask_head.0.ffn.layers.0.0.weight"]),
    }  # fmt: skip


def settings(config: dict, weights: dict[str, np.ndarray]) -> VideoKNetSettings:
    things, stuff = config["num_thing_classes"], config["num_stuff_classes"]
    ours = map_keys({key: torch.empty(0) for key in weights}, key_maps.VIDEO_KNET)
    link, fuse = (way(ours, f"stages.0.{part}.") for part in ("link", "fuse"))
    return VideoKNetSettings(
        things + stuff, stuff, BACKBONES[config["backbone"]], config["channels"], config["num_thing_kernels"], config["stages"],
        config["heads"], config["ffn"], link, fuse, config["mask_upsample_stride"],
        categories=things_first(KITTI_STEP_THINGS, things + stuff), track_layers=sum(key.endswith(".weight") for key in ours if "embed.layers" in key),
        merge=MergeSettings(config["max_per_img"], config["instance_score_thr"], config["overlap_thr"]),
        tracking=tracker_settings(config["tracker"]) if "tracker" in config else QuasiDenseSettings(),
    )  # fmt: skip


def load(model: KNet, weights: dict[str, np.ndarray]) -> KNet:
    state = {key: torch.from_numpy(value) for key, value in weights.items()}
    load_into(model, state, key_maps.VIDEO_KNET, name="the case", ignore=key_maps.VIDEO_KNET_IGNORED)
    return model


class _Recorded(VideoKNet):
    """Keeps what the last frame gave."""

    def segment_clip(self, frame, state):
        self.clip, self.found = super().segment_clip(frame, state), None
        return self.clip

    def track(self, found, state):
        self.found, self.similarity, self.matched = found, similarity(state.tracks, found), super().track(found, state)
        return self.matched

    def _frame(self, clip, state):
        self.ids = [0, *self.link(clip, state)]
        state.written += 1


PARTS = ["backbone", "fpn", "initial.fpn", "initial"]


def _video(manifest: dict, model: _Recorded, images: np.ndarray) -> Iterator[tuple]:
    state = model.new_state(*images.shape[1:3])
    every = int(re.search(r"every (\d+)th channel", manifest["notes"])[1])
    for t, image in enumerate(images):
        taps = Taps(model, [*PARTS, *stage_parts(model.stages, "stages")])
        model.step(model.encode_frames(image[None], state), state)
        taps.close()
        found = [*network_taps(taps, every), *stage_taps(taps, model.stages, "stages", "stage")]
        found += [] if t == 0 else [(f"stage{len(model.stages) - 1}_linked_kernels", model.clip.refined.linked.numpy())]
        yield from ((f"tap/f{t}/{name}", result) for name, result in found if f"f{t}/{name}" in manifest["taps"])
        if model.found is not None and model.similarity is not None:
            yield f"tap/f{t}/match_scores", model.similarity.numpy()
        yield from ((f"out/f{t}/{name}", *result) for name, *result in _results(model))


def run_instances(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    model = for_inference(load(VideoKNetInstances(_instance_settings(manifest["config"])), weights), torch.float32)
    with torch.inference_mode():
        yield from _whole(manifest, model, inputs["in/frames"])


def _instance_settings(config: dict) -> VideoKNetInstancesSettings:
    if config["query_merge"] != "mean" or config["clip_stages"] != config["clip_stages_with_class"] + 1 or config["mask_thr"] != 0.5:
        raise ValueError("only kernels that are the mean over the frames, one last stage without classes, masks from one half on")
    return VideoKNetInstancesSettings(
        config["num_classes"], 0, BACKBONES[config["backbone"]], config["channels"], config["num_kernels"], config["frame_stages"],
        config["heads"], config["ffn"], upsample=config["mask_upsample_stride"], clip_stages=config["clip_stages_with_class"],
        top=config["max_per_img"], short_side=None,
    )  # fmt: skip


def _whole(manifest: dict, model: VideoKNetInstances, images: np.ndarray) -> Iterator[tuple]:
    state, s = model.new_state(FrameSize.of(*images.shape[1:3], None)), model.settings
    taps = Taps(model, [*PARTS, *stage_parts(model.stages, "stages")])
    model.link(model.per_frame(state.size.input(images, s.mean, s.std)), state)
    taps.close()
    found = [*network_taps(taps, 8), *stage_taps(taps, model.stages, "stages", "frame_stage"), *_clip_taps(model, state)]
    rows = {name: slice(0, 1) for name, _ in found if name.startswith(("backbone", "fpn"))}
    yield from ((f"tap/{name}", result[rows.get(name, slice(None))]) for name, result in found if name in manifest["taps"])
    tracks = model.finish(state)
    yield from (("out/labels", tracks.labels), ("out/scores", tracks.scores))
    yield "out/masks", np.stack([track.masks for track in tracks], 1).astype(np.uint8), MAP_RULE


def _clip_taps(model: VideoKNetInstances, state: VideoKNetClip) -> Iterator[tuple]:
    frames, last = range(len(state.features)), model.settings.clip_stages
    kernels = state.kernels[None] / len(frames)
    yield "clip_kernels", kernels.numpy()
    for i in range(last):
        kernels = model.refine(i, kernels, state)
        masks = torch.cat([model.frame(i + 1, t, kernels, state)[2] for t in frames])[None]
        parts = {"cls_logits": model.clip_stages[i].classify(kernels), "mask_logits": masks, "kernels": kernels}
        yield from ((f"clip_stage{i}_{name}", result.numpy()) for name, result in parts.items())
    fitted = [model.clip_stages[last](*model.frame(last, t, kernels, state)) for t in frames]
    yield f"clip_stage{last}_mask_logits", torch.cat([each.masks for each in fitted])[None].numpy()
    yield f"clip_stage{last}_kernels", torch.cat([each.kernels for each in fitted])[None].numpy()


def stage_parts(stages: nn.ModuleList, name: str) -> list[str]:
    return [part for i in range(len(stages)) for part in (f"{name}.{i}", f"{name}.{i}.update")]


def network_taps(taps: Taps, every: int) -> Iterator[tuple]:
    """Up to the first kernels, of the first call."""
    for part, name in (("backbone", "backbone_c"), ("fpn", "fpn_p"), ("initial.fpn", "semantic_fpn_")):
        yield from ((f"{name}{i}", x[:, ::every]) for i, x in enumerate(taps.outputs(part, 0)))
    features, kernels, masks, semantic = taps.outputs("initial", 0)
    yield from (("init_x_feats", features[:, ::every]), ("init_kernels", kernels), ("init_mask_logits", masks), ("seg_logits", semantic))


def stage_taps(taps: Taps, stages: nn.ModuleList, part: str, name: str) -> Iterator[tuple]:
    for i in range(len(stages)):
        classes, masks, kernels, _ = taps.outputs(f"{part}.{i}", 0)
        yield from ((f"{name}{i}_cls_logits", classes), (f"{name}{i}_mask_logits", masks), (f"{name}{i}_kernels", kernels))
        yield f"{name}{i}_masked_feats", taps.inputs(f"{part}.{i}.update", 0)[0]


def _results(model: _Recorded) -> Iterator[tuple]:
    s, segments, labels = model.settings, model.clip.panoptic.segments, model.clip.panoptic.labels
    things = [segment for segment in segments if segment.is_thing]
    offset = s.classes - s.stuff - 1
    yield "scores", model.clip.refined.classes[0].sigmoid().numpy()
    yield "panoptic", labels.astype(np.int32), MAP_RULE
    rows = [(i, True, x.category, x.rank, -1) if x.is_thing else (i, False, x.category - offset, -1, x.area) for i, x in enumerate(segments, 1)]
    yield "segments", np.array(rows, np.int32).reshape(-1, 5)
    yield "segment_scores", np.array([x.score if x.is_thing else -1 for x in segments], np.float32)
    ids = iter(model.ids[1:])
    yield "track", np.array([0, *(next(ids) if x.is_thing else 0 for x in segments)], np.int32)[labels], MAP_RULE
    yield "semantic", np.array([0, *(s.categories[x.category] for x in segments)], np.int32)[labels], MAP_RULE
    if things:
        found, (kept, ids) = model.found, model.matched
        yield from (("track_embed", found.embeddings), ("track_boxes_in", found.boxes))
        yield from (("track_boxes", found.boxes[kept]), ("track_labels", found.labels[kept]), ("track_ids", ids))
