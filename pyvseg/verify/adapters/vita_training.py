# SPDX-License-Identifier: Apache-2.0
"""One training step of VITA and of GenVIS with stored random numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pyvseg.checkpoints import key_maps, map_keys
from pyvseg.models import zoo
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.genvis import GenVISSettings
from pyvseg.models.vita import VITA, VITASettings
from pyvseg.training.genvis import GenVISCriterion
from pyvseg.training.set_criterion import SetCriterion
from pyvseg.training.vita import VideoTarget, VITACriterion, by_layer
from pyvseg.verify.adapters.vita_inference import settings
from pyvseg.verify.compare import Rule

DETECTOR_GRADIENTS = (
    "sem_seg_head.pixel_decoder.input_proj.0.0.weight",
    "sem_seg_head.pixel_decoder.mask_features.weight",
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
    "sem_seg_head.predictor.class_embed.weight",
    "sem_seg_head.predictor.query_feat.weight",
)
GRADIENTS = tuple(
    f"vita_module.{name}.weight"
    for name in (
        *("class_embed", "enc_self_attn.0.self_attn.out_proj", "fq_pos", "input_proj_dec", "query_embed", "query_feat"),
        *("sim_embed_clip", "sim_embed_frame", "vita_mask_features"),
    )
)
MEMORY_GRADIENTS = tuple(f"vita_module.pre_{what}_embed_{part}.weight" for what in ("memory", "query") for part in "kv")


class _Stored:
    """Random numbers by the name of what is matched: one set per problem, then the candidates, then the rest."""

    def __init__(self, inputs: dict[str, np.ndarray]) -> None:
        self.inputs = inputs

    def __call__(self, name: str):
        start = f"in/rand/{name}/"
        parts = list(torch.from_numpy(self.inputs[f"{start}match"]).split(1))
        parts += [torch.from_numpy(self.inputs[f"{start}{part}"]) for part in ("over", "rest") if f"{start}{part}" in self.inputs]

        def numbers(shape: tuple[int, ...]) -> Tensor:
            if parts[0].shape != shape:
                raise ValueError(f"{name}: numbers of shape {shape} are asked for, the case stores {tuple(parts[0].shape)} next")
            return parts.pop(0)

        return numbers


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray], system: str) -> Iterator[tuple]:
    config = manifest["config"]
    sizes = settings(config, weights, GenVISSettings if system == "genvis" else VITASettings)
    model = zoo.build(sizes, {k: torch.from_numpy(v) for k, v in weights.items()}, name="the case", system=system).train()
    images, targets = _batch(model, inputs)
    criterion = SetCriterion(config["num_classes"], config["train_points"])
    if system == "genvis":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("video."))
    losses, seen = (GenVISCriterion if system == "genvis" else VITACriterion)(criterion, criterion)(model, images, targets, _Stored(inputs))
    total = sum(losses.values())
    total.backward()
    for name, loss in losses.items():
        yield f"out/loss/{name}", loss.detach().reshape(1).numpy()
    yield "out/total", total.detach().reshape(1).numpy()
    published = map_keys({k: k for k in weights}, key_maps.MASK2FORMER)
    gradients = {published[name]: p.grad for name, p in model.named_parameters()}
    for key in GRADIENTS + (MEMORY_GRADIENTS if system == "genvis" else DETECTOR_GRADIENTS):
        yield f"out/grad/{key}", gradients[key].numpy(), Rule(0, manifest["tolerance"]["grad"], scaled=True)
    if system == "genvis":  # whose own pass has no use for the bare queries' matches
        shown = [frame for target in targets for frame in target.frames()]
        seen["frame_matches"].insert(0, criterion.match(seen["frame"][0], shown, _Stored(inputs)("frame/0")))
    yield from _frame_taps(seen)
    yield from _genvis_taps(seen, len(targets)) if system == "genvis" else _vita_taps(seen, targets)


def _batch(model: VITA, inputs: dict[str, np.ndarray]) -> tuple[Tensor, list[VideoTarget]]:
    """All videos padded to one size, and their targets: ids count from the smallest of the video, instances that are never seen go."""
    videos = [f"in/video{b}" for b in range(sum(key.endswith("/frames") for key in inputs))]
    sizes = [FrameSize.of(*inputs[f"{video}/frames"].shape[1:3], None) for video in videos]
    padded = tuple(max(size.padded[axis] for size in sizes) for axis in (0, 1))
    images, targets = [], []
    for video, size in zip(videos, sizes):
        s = model.settings
        images.append(FrameSize(size.source, size.resized, padded).input(inputs[f"{video}/frames"], s.mean, s.std))
        ids, classes = (torch.from_numpy(inputs[f"{video}/{name}"]).T for name in ("ids", "classes"))
        height, width = size.resized
        masks = torch.nn.functional.pad(torch.from_numpy(inputs[f"{video}/masks"]).transpose(0, 1), (0, padded[1] - width, 0, padded[0] - height))
        there = ids >= 0
        ids = torch.where(there, ids - ids[there].min(), -1)
        first = there.to(torch.uint8).argmax(1)
        labels = classes.gather(1, first[:, None])[:, 0]
        kept = there.any(1)
        targets.append(VideoTarget(labels[kept], ids[kept], masks[kept].float()))
    return torch.cat(images), targets


def _frame_taps(seen: dict) -> Iterator[tuple]:
    predictions, matches = seen["frame"], seen["frame_matches"]
    for i, name, _ in by_layer(len(predictions)):
        yield f"tap/frame/{name}/pred_logits", predictions[i].logits.detach().numpy()
        yield f"tap/frame/{name}/pred_masks", predictions[i].masks.detach().numpy()
        yield f"tap/frame/{name}/match", _padded([torch.stack(match, 1) for match in matches[i]])


def _padded(matches: list[Tensor]) -> np.ndarray:
    """(problems, pairs, 2), -1 where a problem has fewer pairs."""
    return torch.nn.utils.rnn.pad_sequence(matches, batch_first=True, padding_value=-1).numpy()


def _output_taps(tap: str, output, videos: int) -> Iterator[tuple]:
    for i, name, _ in by_layer(len(output.predictions)):
        yield f"{tap}/{name}/pred_logits", output.predictions[i].logits.detach().unflatten(0, (-1, videos)).numpy()
        yield f"{tap}/{name}/pred_masks", output.predictions[i].masks.detach().unflatten(0, (-1, videos)).numpy()
    yield f"{tap}/pred_fq_embed", output.frames.detach().unflatten(0, (-1, videos)).numpy()
    yield f"{tap}/pred_cq_embed", output.queries.detach().unflatten(0, (-1, videos)).numpy()


def _vita_taps(seen: dict, targets: list[VideoTarget]) -> Iterator[tuple]:
    yield from _output_taps("tap/clip", seen["clip"], len(targets))
    for i, name, _ in by_layer(len(seen["clip_matches"])):
        yield f"tap/clip/{name}/match", _padded([torch.stack(match, 1) for match in seen["clip_matches"][i]])
    for b, target in enumerate(targets):
        yield f"tap/clip/target{b}/ids", target.ids.numpy()
        yield f"tap/clip/target{b}/labels", target.labels.numpy()


def _genvis_taps(seen: dict, videos: int) -> Iterator[tuple]:
    for clip, (output, step) in enumerate(zip(seen["clips"], seen["walk"].history)):
        tap = f"tap/clip{clip}"
        yield from _output_taps(tap, output, videos)
        for i, name, _ in by_layer(len(step["slots"])):
            pairs = [torch.stack([slots, torch.arange(len(slots))], 1) for slots in step["slots"][i]]
            matches = _padded(pairs)
            valid = _padded([step["valid"][p % videos].long() for p in range(len(pairs))]) != 0  # padding too
            yield f"{tap}/{name}/match", matches, Rule(where=np.repeat(valid[..., None], 2, -1))
        for b, part in enumerate(step["parts"]):
            yield f"{tap}/target{b}/ids", part.ids.numpy()
            yield f"{tap}/target{b}/labels", part.labels.numpy()
            yield f"{tap}/target{b}/valid", step["valid"][b].numpy().astype(np.uint8)
            yield f"{tap}/target{b}/new", step["new"][b].numpy().astype(np.uint8)
