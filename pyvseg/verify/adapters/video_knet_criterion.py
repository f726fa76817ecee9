# SPDX-License-Identifier: Apache-2.0
"""A training step of Video K-Net: both frames of a pair through the network, losses, matches and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from pyvseg.checkpoints import key_maps, map_keys
from pyvseg.layers.kernel_head import Refined
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.video_knet import VideoKNet
from pyvseg.training.knet import KNetCriterion, Predictions, Truth, Wanted, predictions_of, truth_of

STORED = (  # gradients that the cases hold whole
    "backbone.layer4.1.bn2.weight", "embed_fcs.1.weight", "neck.fpn_convs.3.conv.bias", "roi_head.mask_head.0.fc_mask.bias",
    "roi_head.mask_head.0.kernel_update_conv.norm_in.weight", "roi_head.mask_head.{last}.attention_previous_norm.weight",
    "roi_head.mask_head.{last}.fc_cls.bias", "roi_head.mask_head.{last}.link_ffn_norm.bias", "rpn_head.conv_seg.weight", "rpn_head.init_kernels.weight",
    "rpn_head.loc_convs.0.gn.weight", "track_head.fc_embed.bias",
)  # fmt: skip
FROZEN = ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.")


def run(model: VideoKNet, weights: dict[str, np.ndarray], config: dict, inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    """`model` with its weights, not folded."""
    s = model.settings
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))
    size, criterion = FrameSize.of(*inputs["in/frames"].shape[1:3], None), KNetCriterion(s.classes, s.stuff, s.upsample)
    images = size.input(inputs["in/frames"], s.mean, s.std)
    truths = {name: _truth(name, inputs, model, size.padded, config["mask_assign_stride"]) for name in ("key", "ref")}
    reference = predictions_of(model, images[1:])
    key = predictions_of(model, images[:1], reference.stages[-1].kernels)
    losses = criterion(key, [truths["key"]])
    for name, loss in criterion(reference, [truths["ref"]]).items():
        losses[name + ("_ref_rpn" if "rpn" in name else "_ref")] = loss
    losses |= criterion.track_losses(model, key, reference, [truths["key"]], [truths["ref"]])
    total = criterion.total(losses)
    total.backward()
    yield from ((f"out/loss/{name}", (criterion.weight(name) * loss).detach().reshape(1).numpy()) for name, loss in losses.items())
    yield "out/total", total.detach().reshape(1).numpy()
    with torch.no_grad():
        for name, suffix, predictions in (("key", "", key), ("ref", "_ref", reference)):
            yield from _frame(criterion, name, suffix, predictions, truths[name])
        yield from _tracking(criterion, model, key, reference, truths)
    yield from gradients(model, weights, config["parameter_order"], STORED)


def _truth(name: str, inputs: dict[str, np.ndarray], model: VideoKNet, padded: tuple[int, int], stride: int) -> Truth:
    labels, masks, ids, semantic = (torch.from_numpy(inputs[f"in/{name}_{part}"]) for part in ("labels", "masks", "ids", "semantic"))
    table = torch.full((256,), -1)
    table[list(model.settings.categories)] = torch.arange(model.settings.classes)
    return truth_of(labels, masks, ids, table[semantic], len(model.settings.things), padded, stride)


def _frame(criterion: KNetCriterion, name: str, suffix: str, predictions: Predictions, truth: Truth) -> Iterator[tuple]:
    """What the network said, at its own size, and what was wanted of it."""
    initial, things = predictions.initial, predictions.initial.masks.shape[1] - criterion.stuff
    yield from ((f"tap/{name}/init_mask_logits", initial.masks[:, :things].numpy()), (f"tap/{name}/seg_logits", initial.semantic.numpy()))
    match = criterion.match(None, criterion.large(initial).masks[0], truth)
    labels = torch.full((things,), criterion.classes)
    labels[match[0]] = truth.labels[match[1]]
    _, semantic = criterion.painted(truth, match)
    yield f"tap/{name}/init_labels", labels.numpy()
    yield f"tap/{name}/seg_targets", semantic.where(semantic >= 0, criterion.classes)[None].numpy()
    for i, stage in enumerate(predictions.stages):
        wanted = criterion.wanted(truth, match, stage.classes.shape[1])
        yield from _stage(f"tap/{name}/stage{i}_", wanted, stage)
        found = wanted.labels < criterion.classes
        right = (stage.classes[0].argmax(-1) == wanted.labels)[found]
        yield f"out/loss/s{i}_pos_acc{suffix}", (100 * right.float().mean()).reshape(1).numpy()
        match = criterion.match(stage.classes[0], criterion.large(stage).masks[0], truth)


def _stage(tap: str, wanted: Wanted, stage: Refined) -> Iterator[tuple]:
    yield from ((tap + "mask_logits", stage.masks.numpy()), (tap + "cls_logits", stage.classes.numpy()))
    yield from ((tap + "labels", wanted.labels.numpy()), (tap + "label_weights", wanted.weights.numpy()))
    yield tap + "mask_targets_area", wanted.masks.flatten(1).sum(1).numpy()


def _tracking(criterion: KNetCriterion, model: VideoKNet, key: Predictions, reference: Predictions, truths: dict[str, Truth]) -> Iterator[tuple]:
    [(a, ids)], [(b, others)] = criterion.embedded(model, key, [truths["key"]]), criterion.embedded(model, reference, [truths["ref"]])
    same = ids[:, None] == others
    yield "tap/track_similarity", (a @ b.T).numpy()
    yield "tap/track_cosine", (F.normalize(a) @ F.normalize(b).T).numpy()
    yield from (("tap/track_targets", same.int().numpy()), ("tap/track_weights", same.any(1).float().numpy()))


def gradients(model: VideoKNet, weights: dict[str, np.ndarray], order: list[str], whole: tuple[str, ...]) -> Iterator[tuple]:
    """The norm of every parameter's, -1 where there is none, and those that are stored whole."""
    names = {theirs: ours for theirs in weights for ours in map_keys({theirs: torch.empty(0)}, key_maps.VIDEO_KNET)}
    ours = dict(model.named_parameters())
    yield "out/grad_norm", np.array([-1.0 if (grad := ours[names[name]].grad) is None else float(grad.norm()) for name in order], np.float32)
    for name in (stored.format(last=len(model.stages) - 1) for stored in whole):
        yield f"out/grad/{name}", ours[names[name]].grad.numpy()
