# SPDX-License-Identifier: Apache-2.0
"""The criterion of PolyphonicFormer (Yuan et al., ECCV 2022): K-Net's where something is annotated, and depth, query by query.

A step takes a key frame and a reference frame of the same video, (B, 3, H, W) each; frames of a batch belong together one by one. Only
what recognises things learns from the reference frame:

    key = predictions_of(model, key_images)
    with torch.no_grad():
        reference = predictions_of(model, reference_images)
    losses = criterion(key, key_truths) | criterion.track_losses(model, key, reference, key_truths, reference_truths)
    criterion.total(losses).backward()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg.layers.depth_kernels import DepthFrames, metres
from pyvseg.layers.roi_embedding import pyramid_roi_align
from pyvseg.models.polyphonicformer import PolyphonicFormer, extents
from pyvseg.training.knet import EPS, KNetCriterion, Truth, Wanted, class_costs, focal_losses, pair_losses
from pyvseg.training.set_criterion import Match, instance_count, solve


class DepthTruth(NamedTuple):
    """What there is in one frame: depth (H, W) in metres, as large as the masks, 0 where none was measured; boxes (M, 4) of the things,
    x1, y1, x2, y2 in pixels of the frame; annotated (H, W) bool: where anything is."""

    seen: Truth
    depth: Tensor
    boxes: Tensor
    annotated: Tensor


def depth_truth_of(seen: Truth, depth: Tensor, padded: tuple[int, int]) -> DepthTruth:
    """depth (h, w) of the frame; `padded` is the network's size. Boxes are those of the masks as they are brought back to it, whose
    soft edges count as well."""
    room = (0, padded[1] - depth.shape[1], 0, padded[0] - depth.shape[0])
    small = F.interpolate(F.pad(depth, room)[None, None], seen.masks.shape[1:], mode="nearest")[0, 0]
    boxes = np.zeros((len(seen.masks), 4), np.float32)
    for row, mask in enumerate(seen.masks):
        large = F.interpolate(mask[None, None], padded, mode="bilinear", align_corners=False)[0, 0] > 0
        if large.any():
            boxes[row] = extents(large.cpu().numpy().astype(np.int16), [1])[0]
    annotated = (torch.cat([seen.masks, seen.stuff_masks]) > 0).any(0)
    return DepthTruth(seen, small, torch.from_numpy(boxes).to(depth.device), annotated)


class Stage(NamedTuple):
    """What a stage says: classes (B, N, K), masks and depth (B, N, H, W), logits."""

    classes: Tensor
    masks: Tensor
    depth: Tensor


class Predictions(NamedTuple):
    """What the network says of B frames: the pyramid's maps, and what it knows before its stages and after each."""

    maps: list[Tensor]
    initial: DepthFrames
    stages: list[Stage]


def predictions_of(model: PolyphonicFormer, images: Tensor) -> Predictions:
    """Of normalised images (B, 3, H, W), padded to multiples of 32."""
    maps = model.fpn(model.backbone(images.to(model.dtype)))
    frames = initial = model.initial(maps)
    stages = []
    for stage in model.stages:
        refined = stage(frames)
        frames = frames._replace(masks=refined.masks, kernels=refined.kernels, depth_kernels=refined.depth_kernels)
        stages.append(Stage(refined.classes, refined.masks, stage.depth(refined.depth_kernels, frames.depth_features)))
    return Predictions(maps, initial, stages)


@dataclass(frozen=True)
class PolyphonicCriterion(KNetCriterion):
    """Weights as of K-Net, and of depth after the stages and before them; nearest and farthest in metres, as in the model's settings."""

    stuff: int = 11
    upsample: int = 2
    focal: bool = True
    depth: float = 5.0
    initial_depth: float = 1.0
    nearest: float = 0.01
    farthest: float = 80.0

    def __call__(self, predictions: Predictions, truths: Sequence[DepthTruth]) -> dict[str, Tensor]:
        """Unweighted losses by name: loss_rpn_mask, _dice, _rank, _seg, loss_depth, and sI_loss_cls, _rank, _rpn_mask, _rpn_dice, _depth
        of stage I; depth_dense, of the depth of the frame as a whole, is shown and, as published, not learnt from."""
        initial, dense = self.large(predictions.initial), self.up(predictions.initial.dense)
        matches = [self.match(None, *item) for item in zip(initial.masks, truths)]
        losses = self.initial_losses(initial, truths, matches) | self.initial_depth_losses(dense, truths, matches)
        for i, stage in enumerate(predictions.stages):
            stage = Stage(stage.classes, self.up(stage.masks), self.up(stage.depth))
            wanted = [self.wanted(truth.seen, match, stage.classes.shape[1]) for truth, match in zip(truths, matches)]
            losses |= {f"s{i}_{name}": loss for name, loss in self.stage_losses(stage, wanted, truths).items()}
            matches = [self.match(*item) for item in zip(stage.classes, stage.masks, truths)]
        return losses

    def weight(self, name: str) -> float:
        if "depth" in name.split("_"):
            return self.depth if name.startswith("s") else self.initial_depth
        return super().weight(name)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of what is called a loss."""
        return super().total({name: loss for name, loss in losses.items() if "loss" in name})

    def up(self, maps: Tensor) -> Tensor:
        return F.interpolate(maps.float(), scale_factor=self.upsample, mode="bilinear", align_corners=False)

    def large(self, found: DepthFrames) -> DepthFrames:
        things = found.masks.shape[1] - self.stuff
        return found._replace(masks=self.up(found.masks[:, :things]), semantic=self.up(found.semantic))

    @torch.no_grad()
    def match(self, classes: Tensor | None, masks: Tensor, truth: DepthTruth) -> Match:
        """As K-Net's, of the annotated pixels, and of shares as they are."""
        kernels = len(masks) if classes is None else len(masks) - self.stuff
        share, truths = masks[:kernels, truth.annotated].float().sigmoid(), truth.seen.masks[:, truth.annotated]
        dice = -2 * share @ truths.T / (share.square().sum(1)[:, None] + EPS + truths.square().sum(1) + EPS)
        same = share @ truths.T + (1 - share) @ (1 - truths).T
        costs = self.dice * dice - self.mask * same / max(truths.shape[1], 1)
        if classes is not None:
            costs = costs + self.cls * class_costs(classes[:kernels], truth.seen.labels)
        return solve(costs)

    def initial_losses(self, initial: DepthFrames, truths: Sequence[DepthTruth], matches: Sequence[Match]) -> dict[str, Tensor]:
        rank, semantic = (torch.stack(maps) for maps in zip(*(self.painted(truth.seen, match) for truth, match in zip(truths, matches))))
        chosen = torch.cat([masks[kernels] for masks, (kernels, _) in zip(initial.masks, matches)])
        wanted = torch.cat([truth.seen.masks[found] for truth, (_, found) in zip(truths, matches)])
        where = torch.cat([truth.annotated.expand(len(found), -1, -1) for truth, (_, found) in zip(truths, matches)])
        return {
            **_mask_losses(chosen, wanted, where),
            "loss_rpn_rank": _rank_loss(initial.masks, rank),
            "loss_rpn_seg": self._semantic_loss(initial.semantic.float(), semantic),
        }

    def _semantic_loss(self, logits: Tensor, wanted: Tensor) -> Tensor:
        known = wanted >= 0
        truth = F.one_hot(wanted.clamp(min=0), self.classes).movedim(-1, 1)
        return (focal_losses(logits, truth) * known[:, None]).sum() / known.sum().clamp(min=1)

    def initial_depth_losses(self, dense: Tensor, truths: Sequence[DepthTruth], matches: Sequence[Match]) -> dict[str, Tensor]:
        """dense (B, 1, H, W) logits stand for every kernel's. Edges of things are soft here, those of stuff are not."""
        weights = []
        for truth, (_, found) in zip(truths, matches):
            weights.append(torch.cat([truth.seen.masks[found], (truth.seen.stuff_masks > 0).float()]) * (truth.depth > 0))
        logits = torch.cat([plane.expand(len(own), -1, -1) for plane, own in zip(dense, weights)])
        depth = torch.stack([truth.depth for truth in truths])
        own = torch.cat([truth.depth.expand(len(own), -1, -1) for truth, own in zip(truths, weights)])
        return {"loss_depth": self.depth_loss(logits, own, torch.cat(weights)), "depth_dense": self.depth_loss(dense[:, 0], depth, (depth > 0).float())}

    def stage_losses(self, stage: Stage, wanted: Sequence[Wanted], truths: Sequence[DepthTruth]) -> dict[str, Tensor]:
        """loss_cls, loss_rank, loss_rpn_mask, loss_rpn_dice and loss_depth."""
        labels, weights, masks = (torch.cat(parts) for parts in zip(*wanted))
        found, count = labels < self.classes, stage.classes.shape[1]
        logits = stage.classes.float().flatten(0, 1)
        focal = focal_losses(logits, F.one_hot(labels, self.classes + 1)[:, :-1]) * weights
        where = torch.cat([truth.annotated.expand(count, -1, -1) for truth in truths])
        depth = torch.cat([truth.depth.expand(count, -1, -1) for truth in truths])
        rank = torch.stack([_rank(own.masks, own.labels < self.classes) for own in wanted])
        return {
            "loss_cls": focal.sum() / instance_count(int(found.sum()), logits),
            "loss_rank": _rank_loss(stage.masks, rank),
            **_mask_losses(stage.masks.flatten(0, 1)[found], masks[found], where[found]),
            "loss_depth": self.depth_loss(stage.depth.flatten(0, 1), depth, self.depth_weights(wanted, truths)),
        }

    def depth_weights(self, wanted: Sequence[Wanted], truths: Sequence[DepthTruth]) -> Tensor:
        """(B * N, H, W). The last kernel learns the depth of the whole frame, whatever its class."""
        own = [torch.cat([each.masks[:-1], torch.ones_like(each.masks[:1])]) for each in wanted]
        return torch.cat([weights * (truth.depth > 0) for weights, truth in zip(own, truths)])

    def depth_loss(self, logits: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
        """(N, H, W) each: mean of three errors where there is a weight and depth within the farthest: of logarithms, squared and relative.
        The first takes away the sum of differences, not squared: so it was published."""
        rows = (weights > 0) & (truth > 0) & (truth < self.farthest)
        if not rows.any():
            return logits.sum() * 0
        found, truth, weights, n = metres(logits[rows], self.nearest, self.farthest), truth[rows], weights[rows], int(rows.sum())
        logs, relative = (found.log() - truth.log()) * weights, (found - truth) * weights / truth
        terms = logs.square().sum() / n - logs.sum() / n**2, (relative.square().sum() / n).sqrt(), relative.abs().sum() / n
        return torch.stack(terms).mean()

    def track_losses(
        self, model: PolyphonicFormer, key: Predictions, reference: Predictions, key_truths: Sequence[DepthTruth], reference_truths: Sequence[DepthTruth]
    ) -> dict[str, Tensor]:
        return pair_losses(self.embedded(model, key, key_truths), self.embedded(model, reference, reference_truths, by_class=False))

    def embedded(
        self, model: PolyphonicFormer, predictions: Predictions, truths: Sequence[DepthTruth], by_class: bool = True
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each frame: embeddings (M, E) from the annotated boxes of the things that a kernel got, and the things' ids (M,). In the
        reference frame kernels get them by masks alone."""
        last, results = predictions.stages[-1], []
        masks = self.up(last.masks if by_class else last.masks[:, : last.masks.shape[1] - self.stuff])
        for i, truth in enumerate(truths):
            _, found = self.match(last.classes[i] if by_class else None, masks[i], truth)
            rois = pyramid_roi_align([level[i : i + 1] for level in predictions.maps], truth.boxes[found])
            results.append((model.embed(rois), truth.seen.ids[found]))
        return results


def _rank(masks: Tensor, found: Tensor) -> Tensor:
    """(H, W): the kernel of every pixel, the last one that has it, or -1."""
    rank = torch.full(masks.shape[1:], -1, device=masks.device)
    for kernel in found.nonzero()[:, 0].tolist():
        rank[masks[kernel] > 0] = kernel
    return rank


def _rank_loss(logits: Tensor, rank: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), rank, ignore_index=-1, reduction="none").mean()


def _mask_losses(logits: Tensor, truth: Tensor, where: Tensor) -> dict[str, Tensor]:
    """loss_rpn_mask and loss_rpn_dice of pairs (N, H, W) at the pixels of `where`; 0 where there are none."""
    if not where.any():
        return {"loss_rpn_mask": logits.sum() * 0, "loss_rpn_dice": logits.sum() * 0}
    x, y, where = logits.float().flatten(1), truth.flatten(1), where.flatten(1)
    p = x.sigmoid() * where
    dice = 1 - 2 * (p * y).sum(1) / (p.square().sum(1) + EPS + (y * where).square().sum(1) + EPS)
    return {"loss_rpn_mask": F.binary_cross_entropy_with_logits(x[where], y[where]), "loss_rpn_dice": dice.mean()}
