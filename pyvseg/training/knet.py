# SPDX-License-Identifier: Apache-2.0
"""The criterion of Video K-Net (Li et al., CVPR 2022) for panoptic segmentation, which is that of K-Net for every frame.

A step takes a key frame and a reference frame of the same video, (B, 3, H, W) each; frames of a batch belong together one by one:

    reference = predictions_of(model, reference_images)
    key = predictions_of(model, key_images, reference.stages[-1].kernels)
    losses = criterion(key, key_truths) | {f"{name}_ref": loss for name, loss in criterion(reference, reference_truths).items()}
    losses |= criterion.track_losses(model, key, reference, key_truths, reference_truths)
    criterion.total(losses).backward()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg.layers.kernel_head import Refined
from pyvseg.layers.kernel_init import KernelFrames
from pyvseg.models.knet import KNet
from pyvseg.models.video_knet import VideoKNet
from pyvseg.training.quasi_dense import quasi_dense_losses
from pyvseg.training.set_criterion import Match, instance_count, solve

ALPHA, GAMMA, EPS = 0.25, 2.0, 1e-3  # of the focal losses; of dice


class Truth(NamedTuple):
    """What there is in one frame, at a part of its padded size: labels (M,) and masks (M, H, W) of things, their ids (M,) in the video,
    classes (S,) and masks (S, H, W) of the stuff that is there. Masks are float, 0 to 1: their edges are soft."""

    labels: Tensor
    masks: Tensor
    ids: Tensor
    stuff: Tensor
    stuff_masks: Tensor


def truth_of(labels: Tensor, masks: Tensor, ids: Tensor, semantic: Tensor, things: int, padded: tuple[int, int], stride: int = 2) -> Truth:
    """labels, ids (M,), masks (M, h, w) of things; semantic (h, w) by the model's classes, of which the first `things` and those that
    are negative are passed over. `padded` is the network's size, right and below of the frame."""
    stuff = semantic.unique()
    stuff = stuff[stuff >= things]
    size, room = (padded[0] // stride, padded[1] // stride), (0, padded[1] - semantic.shape[1], 0, padded[0] - semantic.shape[0])

    def fit(planes: Tensor) -> Tensor:
        if not len(planes):
            return torch.zeros(0, *size, device=planes.device)
        return F.interpolate(F.pad(planes.float(), room)[None], size, mode="bilinear", align_corners=False)[0]

    return Truth(labels, fit(masks), ids, stuff, fit(semantic == stuff[:, None, None]))


class Predictions(NamedTuple):
    """What the network says of B frames: before its stages, and after each."""

    initial: KernelFrames
    stages: list[Refined]


def predictions_of(model: KNet, images: Tensor, previous: Tensor | None = None) -> Predictions:
    """Of normalised images (B, 3, H, W), padded to multiples of 32; `previous` (B, N, C): the last kernels of the reference frames."""
    frames = initial = model.initial(model.fpn(model.backbone(images.to(model.dtype))))
    stages: list[Refined] = []
    for stage in model.stages:
        last = len(stages) == len(model.stages) - 1
        stages.append(stage(frames.features, frames.kernels, frames.masks, previous if last else None))
        frames = frames._replace(kernels=stages[-1].kernels, masks=stages[-1].masks)
    return Predictions(initial, stages)


class Wanted(NamedTuple):
    """Of one frame and stage: labels (N,), the number of classes where there is nothing; weights (N, K) of the class loss; masks
    (N, H, W)."""

    labels: Tensor
    weights: Tensor
    masks: Tensor


@dataclass(frozen=True)
class KNetCriterion:
    """Weights of the losses, and of the costs where they have the same name.

    classes, stuff, upsample   as in `KNetSettings`; upsampled masks are as large as the truth
    rank                       0: there is no such loss
    focal                      whether pixels' classes are judged one by one, over the annotated ones, and not by softmax over all pixels
    """

    classes: int = 19
    stuff: int = 17
    upsample: int = 4
    cls: float = 2.0
    mask: float = 1.0
    dice: float = 4.0
    rank: float = 0.1
    seg: float = 1.0
    track: float = 0.25
    aux: float = 1.0
    focal: bool = False

    def __call__(self, predictions: Predictions, truths: Sequence[Truth]) -> dict[str, Tensor]:
        """Unweighted losses by name: loss_rpn_mask, _dice, _rank, _seg, and sI_loss_cls, _mask, _dice of stage I.

        Every stage is judged by the match of the prediction before it.
        """
        initial = self.large(predictions.initial)
        matches = [self.match(None, masks, truth) for masks, truth in zip(initial.masks, truths)]
        losses = self.initial_losses(initial, truths, matches)
        for i, stage in enumerate(map(self.large, predictions.stages)):
            wanted = [self.wanted(truth, match, stage.classes.shape[1]) for truth, match in zip(truths, matches)]
            losses |= {f"s{i}_{name}": loss for name, loss in self.stage_losses(stage, wanted).items()}
            matches = [self.match(*item) for item in zip(stage.classes, stage.masks, truths)]
        return losses

    def weight(self, name: str) -> float:
        """Of a loss: of the first part of its name that says what it is."""
        parts = [part for part in name.split("_") if part in ("cls", "mask", "dice", "rank", "seg", "track", "aux")]
        return self.aux if "aux" in parts else getattr(self, parts[0])

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return sum(self.weight(name) * loss for name, loss in losses.items())

    def large(self, found: KernelFrames | Refined) -> KernelFrames | Refined:
        """With masks as large as the truth; before the stages those of things only."""
        up = lambda maps: F.interpolate(maps.float(), scale_factor=self.upsample, mode="bilinear", align_corners=False)  # noqa: E731
        if isinstance(found, Refined):
            return found._replace(masks=up(found.masks))
        return found._replace(masks=up(found.masks[:, : found.masks.shape[1] - self.stuff]), semantic=up(found.semantic))

    @torch.no_grad()
    def match(self, classes: Tensor | None, masks: Tensor, truth: Truth) -> Match:
        """Kernels of things and the things that they got; classes (N, K) logits or None, masks (N, H, W) logits. Stuff is no part of it."""
        kernels = len(masks) if classes is None else len(masks) - self.stuff
        share, truths = masks[:kernels].float().flatten(1).sigmoid(), truth.masks.flatten(1)
        sure = share.clamp(min=0.001)
        dice = -2 * sure @ truths.T / (sure.square().sum(1)[:, None] + EPS + truths.square().sum(1) + EPS)
        sure = share.clamp(min=0.01)
        costs = self.dice * dice - self.mask * (sure @ truths.T + (1 - sure) @ (1 - truths).T) / max(truths.shape[1], 1)
        if classes is not None:
            costs = costs + self.cls * class_costs(classes[:kernels], truth.labels)
        return solve(costs)

    def initial_losses(self, initial: KernelFrames, truths: Sequence[Truth], matches: Sequence[Match]) -> dict[str, Tensor]:
        """loss_rpn_mask, _dice, _rank and _seg; those of the pixels are means over all of them, annotated or not."""
        things = [self.painted(truth, match) for truth, match in zip(truths, matches)]
        chosen = torch.cat([masks[kernels] for masks, (kernels, _) in zip(initial.masks, matches)])
        wanted = torch.cat([truth.masks[found] for truth, (_, found) in zip(truths, matches)])
        rank, semantic = (torch.stack(maps) for maps in zip(*things))
        losses = {name.replace("loss", "loss_rpn"): loss for name, loss in _mask_losses(chosen, wanted).items()}
        if self.rank:
            losses["loss_rpn_rank"] = F.cross_entropy(initial.masks.float(), rank, ignore_index=-1, reduction="none").mean()
        return losses | {"loss_rpn_seg": self._semantic_loss(initial.semantic.float(), semantic)}

    def _semantic_loss(self, logits: Tensor, wanted: Tensor) -> Tensor:
        if not self.focal:
            return F.cross_entropy(logits, wanted, ignore_index=-1, reduction="none").mean()
        truth = F.one_hot(wanted + 1, self.classes + 1)[..., 1:].movedim(-1, 1)
        return focal_losses(logits, truth).sum() / (wanted >= 0).sum().clamp(min=1)

    def painted(self, truth: Truth, match: Match) -> tuple[Tensor, Tensor]:
        """(H, W) each, -1 where nothing is: the kernel, and the class, of every pixel; later ones over earlier, things over stuff."""
        rank = torch.full(truth.masks.shape[1:], -1, device=truth.masks.device)
        semantic = rank.clone()
        for label, mask in zip(truth.stuff, truth.stuff_masks):
            semantic[mask.bool()] = label
        for kernel, found in zip(*match):
            inside = truth.masks[found].bool()
            rank[inside], semantic[inside] = kernel, truth.labels[found]
        return rank, semantic

    def wanted(self, truth: Truth, match: Match, count: int) -> Wanted:
        """Of `count` kernels: those of things are judged by the classes of things, each of stuff by its own alone."""
        things, device = self.classes - self.stuff, truth.masks.device
        labels = torch.full((count,), self.classes, device=device)
        masks = torch.zeros(count, *truth.masks.shape[1:], device=device)
        kernels, found = match
        labels[kernels], masks[kernels] = truth.labels[found], truth.masks[found]
        own = truth.stuff + count - self.classes
        labels[own], masks[own] = truth.stuff, truth.stuff_masks
        weights = torch.zeros(count, self.classes, device=device)
        weights[: count - self.stuff, :things] = 1
        weights[count - self.stuff :, things:].fill_diagonal_(1)
        return Wanted(labels, weights, masks)

    def stage_losses(self, stage: Refined, wanted: Sequence[Wanted]) -> dict[str, Tensor]:
        """loss_cls, loss_mask and loss_dice."""
        labels, weights, masks = (torch.cat(parts) for parts in zip(*wanted))
        found = labels < self.classes
        logits = stage.classes.float().flatten(0, 1)
        focal = focal_losses(logits, F.one_hot(labels, self.classes + 1)[:, :-1]) * weights
        count = instance_count(int(found.sum()), logits)
        return {"loss_cls": focal.sum() / count, **_mask_losses(stage.masks.flatten(0, 1)[found], masks[found])}

    def track_losses(
        self, model: VideoKNet, key: Predictions, reference: Predictions, key_truths: Sequence[Truth], reference_truths: Sequence[Truth]
    ) -> dict[str, Tensor]:
        """loss_track and loss_track_aux: what the kernels of the same thing have in common, means over the pairs of frames."""
        return pair_losses(self.embedded(model, key, key_truths), self.embedded(model, reference, reference_truths))

    def embedded(self, model: VideoKNet, predictions: Predictions, truths: Sequence[Truth]) -> list[tuple[Tensor, Tensor]]:
        """Of each frame: embeddings (M, C) of the kernels that a thing is matched to, and the things' ids (M,)."""
        last, results = self.large(predictions.stages[-1]), []
        for classes, masks, kernels, truth in zip(last.classes, last.masks, last.linked, truths):
            rows, found = self.match(classes, masks, truth)
            results.append((model.embed(kernels[rows]), truth.ids[found]))
        return results


def pair_losses(key: list[tuple[Tensor, Tensor]], reference: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """loss_track and loss_track_aux of embeddings (M, C) and ids (M,) of each frame, means over the pairs of frames."""
    losses = [quasi_dense_losses(a, b, ids[:, None] == others) for (a, ids), (b, others) in zip(key, reference)]
    return dict(zip(("loss_track", "loss_track_aux"), (torch.stack(each).mean() for each in zip(*losses))))


def class_costs(classes: Tensor, labels: Tensor) -> Tensor:
    """(N, K) logits, (M,) -> (N, M)"""
    p = classes.float().sigmoid()
    on = -(p + 1e-12).log() * ALPHA * (1 - p) ** GAMMA
    off = -(1 - p + 1e-12).log() * (1 - ALPHA) * p**GAMMA
    return (on - off)[:, labels]


def focal_losses(logits: Tensor, truth: Tensor) -> Tensor:
    """Of every logit, for truth 0 or 1 of the same shape."""
    p, truth = logits.sigmoid(), truth.to(logits.dtype)
    focus = torch.where(truth > 0, ALPHA * (1 - p) ** GAMMA, (1 - ALPHA) * p**GAMMA)
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * focus


def _mask_losses(logits: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """loss_mask and loss_dice of pairs (N, H, W); 0 where there are none."""
    if not len(logits):
        return {"loss_mask": logits.sum() * 0, "loss_dice": logits.sum() * 0}
    x, y = logits.float().flatten(1), truth.flatten(1)
    p = x.sigmoid()
    dice = 1 - 2 * (p * y).sum(1) / (p.square().sum(1) + EPS + y.square().sum(1) + EPS)
    return {"loss_mask": F.binary_cross_entropy_with_logits(x, y), "loss_dice": dice.mean()}
