# SPDX-License-Identifier: Apache-2.0
"""A training step of PolyphonicFormer: losses of the key frame, matches, tracking against the reference frame, gradients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from pyvseg.models.frame_size import FrameSize
from pyvseg.models.polyphonicformer import PolyphonicFormer
from pyvseg.training.knet import truth_of
from pyvseg.training.polyphonicformer import DepthTruth, PolyphonicCriterion, Predictions, depth_truth_of, predictions_of
from pyvseg.verify.adapters.video_knet_criterion import FROZEN, gradients

STORED = (  # gradients that the cases hold whole
    "backbone.layer4.1.bn2.weight", "neck.fpn_convs.3.conv.bias", "roi_head.mask_head.0.fc_depth.bias",
    "roi_head.mask_head.0.kernel_update_conv_depth.norm_in.weight", "roi_head.mask_head.{last}.depth_regs.1.bias", "roi_head.mask_head.{last}.fc_cls.bias",
    "roi_head.mask_head.{last}.ffn_norm_depth.weight", "rpn_head.conv_direct_depth.weight", "rpn_head.depth_convs.0.gn.weight",
    "rpn_head.init_kernels.weight", "track_head.convs.0.gn.weight", "track_head.fc_embed.bias",
)  # fmt: skip


def run(model: PolyphonicFormer, weights: dict[str, np.ndarray], config: dict, inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    """`model` with its weights, not folded."""
    s = model.settings
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))
    size, criterion = FrameSize.of(*inputs["in/frames"].shape[1:3], None), PolyphonicCriterion(s.classes, s.stuff, s.upsample)
    images = size.input(inputs["in/frames"], s.mean, s.std)
    truths = {name: _truth(name, inputs, s.classes - s.stuff, size.padded, config["mask_assign_stride"]) for name in ("key", "ref")}
    key = predictions_of(model, images[:1])
    with torch.no_grad():
        reference = predictions_of(model, images[1:])
    losses = criterion(key, [truths["key"]])
    losses |= criterion.track_losses(model, key, reference, [truths["key"]], [truths["ref"]])
    total = criterion.total(losses)
    total.backward()
    yield from ((f"out/loss/{name}", (criterion.weight(name) * loss).detach().reshape(1).numpy()) for name, loss in losses.items())
    yield "out/total", total.detach().reshape(1).numpy()
    with torch.no_grad():
        for name, predictions in (("key", key), ("ref", reference)):
            yield from ((f"tap/{name}/{part}", result.numpy()) for part, result in _said(criterion, predictions))
        yield from _wanted(criterion, key, truths["key"])
        yield from _tracking(criterion, model, key, reference, truths)
    yield from gradients(model, weights, config["parameter_order"], STORED)


def _truth(name: str, inputs: dict[str, np.ndarray], things: int, padded: tuple[int, int], stride: int) -> DepthTruth:
    labels, masks, ids, depth = (torch.from_numpy(inputs[f"in/{name}_{part}"]) for part in ("labels", "masks", "ids", "depth"))
    semantic = torch.full(depth.shape, -1)
    for label, mask in zip(labels, masks):
        semantic[mask > 0] = label
    rows = labels < things
    return depth_truth_of(truth_of(labels[rows], masks[rows], ids[rows], semantic, things, padded, stride), depth, padded)


def _said(criterion: PolyphonicCriterion, predictions: Predictions) -> Iterator[tuple]:
    """What the network said, at its own size."""
    initial = predictions.initial
    yield from (("init_mask_logits", initial.masks[:, : initial.masks.shape[1] - criterion.stuff]), ("seg_logits", initial.semantic))
    yield "init_depth_logits", initial.dense
    for i, stage in enumerate(predictions.stages):
        parts = ("cls_logits", stage.classes), ("mask_logits", stage.masks), ("depth_logits", stage.depth)
        yield from ((f"stage{i}_{name}", logits) for name, logits in parts)


def _wanted(criterion: PolyphonicCriterion, key: Predictions, truth: DepthTruth) -> Iterator[tuple]:
    count, things = key.stages[0].classes.shape[1], key.initial.masks.shape[1] - criterion.stuff
    match = criterion.match(None, criterion.large(key.initial).masks[0], truth)
    _, semantic = criterion.painted(truth.seen, match)
    yield "tap/key/seg_targets", semantic.where(semantic >= 0, criterion.classes)[None].numpy()
    first = criterion.wanted(truth.seen, match, count)
    weights = torch.cat([first.masks[:things], (first.masks[things:] > 0).float()]) * (truth.depth > 0)
    yield from (("tap/key/init_labels", first.labels[:things].numpy()), ("tap/key/init_depth_weight_sum", weights.flatten(1).sum(1).numpy()))
    for i, stage in enumerate(key.stages):
        wanted = criterion.wanted(truth.seen, match, count)
        yield from ((f"tap/key/stage{i}_labels", wanted.labels.numpy()), (f"tap/key/stage{i}_label_weights", wanted.weights.numpy()))
        yield f"tap/key/stage{i}_mask_targets_area", wanted.masks.flatten(1).sum(1).numpy()
        yield f"tap/key/stage{i}_depth_weight_sum", criterion.depth_weights([wanted], [truth]).flatten(1).sum(1).numpy()
        found = wanted.labels < criterion.classes
        right = (stage.classes[0].argmax(-1) == wanted.labels)[found]
        yield f"out/loss/s{i}_pos_acc", (100 * right.float().mean()).reshape(1).numpy()
        match = criterion.match(stage.classes[0], criterion.up(stage.masks)[0], truth)


def _tracking(
    criterion: PolyphonicCriterion, model: PolyphonicFormer, key: Predictions, reference: Predictions, truths: dict[str, DepthTruth]
) -> Iterator[tuple]:
    [(a, ids)], [(b, others)] = criterion.embedded(model, key, [truths["key"]]), criterion.embedded(model, reference, [truths["ref"]], by_class=False)
    same = ids[:, None] == others
    yield from (("tap/track_similarity", (a @ b.T).numpy()), ("tap/track_cosine", (F.normalize(a) @ F.normalize(b).T).numpy()))
    yield from (("tap/track_targets", same.int().numpy()), ("tap/track_weights", same.any(1).float().numpy()))
