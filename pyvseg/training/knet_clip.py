# SPDX-License-Identifier: Apache-2.0
"""The criterion of Video K-Net (Li et al., CVPR 2022) for instance segmentation: of every frame that of K-Net, of a clip this one.

One step takes the F frames of a clip (F, 3, H, W):

    frames = predictions_of(model, images)
    losses = KNetCriterion(40, 0, upsample=2, rank=0.0, focal=True)(frames, frame_truths)
    losses |= clip_losses(criterion, clip_predictions(model, frames), clip_truth)
    criterion.total(losses).backward()
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyvseg.layers.kernel_head import Refined
from pyvseg.models.video_knet_instances import VideoKNetInstances
from pyvseg.training.knet import KNetCriterion, Predictions, Truth


def clip_truth(labels: Tensor, masks: Tensor, ids: Tensor) -> Truth:
    """Of labels and ids (M,) and masks (M, F, H, W), zero where a thing is not: frames stand on top of each other."""
    return Truth(labels, masks.float().flatten(1, 2), ids, labels[:0], masks.new_zeros(0, masks.shape[1] * masks.shape[2], masks.shape[3]).float())


def clip_predictions(model: VideoKNetInstances, frames: Predictions) -> list[Refined]:
    """What the stages of the whole clip say: classes (1, P, K), of the last stage None, and masks (F, P, h, w)."""
    features, last = frames.initial.features, frames.stages[-1]
    kernels, masks, results = last.kernels.mean(0, keepdim=True), last.masks, []
    for stage in model.clip_stages[:-1]:
        transformed = stage.feat_transform(features)
        kernels = stage.refine(stage.pool(masks, transformed).mean(0, keepdim=True), kernels)
        masks = stage.masks(kernels.expand(len(features), -1, -1), transformed)
        results.append(Refined(stage.classify(kernels), masks, kernels, kernels))
    return [*results, model.clip_stages[-1](features, kernels.expand(len(features), -1, -1), masks)]


def clip_losses(criterion: KNetCriterion, stages: Sequence[Refined], truth: Truth) -> dict[str, Tensor]:
    """Unweighted losses by name: tracker_sI_loss_cls, _mask and _dice. A stage is judged by its own match, the last one by that before."""
    losses, match = {}, None
    for i, stage in enumerate(stages):
        masks = criterion.large(stage).masks.transpose(0, 1).flatten(1, 2)
        if stage.classes is not None:
            match = criterion.match(stage.classes[0], masks, truth)
        wanted = criterion.wanted(truth, match, len(masks))
        classes = torch.zeros(1, len(masks), criterion.classes, device=masks.device) if stage.classes is None else stage.classes
        found = criterion.stage_losses(stage._replace(classes=classes, masks=masks[None]), [wanted])
        losses |= {f"tracker_s{i}_{name}": loss for name, loss in found.items() if stage.classes is not None or "cls" not in name}
    return losses
