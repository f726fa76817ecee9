# SPDX-License-Identifier: Apache-2.0
"""The criterion of Mask2Former (Cheng et al., CVPR 2022): one-to-one matching at random points, losses at uncertain ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyvseg.ops import mask_costs, point_sample

RandomPoints = Callable[[tuple[int, ...]], Tensor]  # a shape -> uniform numbers in [0, 1)
Match = tuple[Tensor, Tensor]  # queries and the targets that they got, int64


class Target(NamedTuple):
    """What there is to find in one image or clip: labels (M,), masks (M, H, W) or (M, T, H, W), bool or 0..1."""

    labels: Tensor
    masks: Tensor


@dataclass(frozen=True)
class SetCriterion:
    """Weights and numbers of the published configurations.

    classes              K; class K is "no object" and weighs `no_object` in the class loss
    points               that a mask is sampled at; `oversample` times as many are tried, `importance` of them chosen by uncertainty
    ce, mask, dice       weights of the three costs and losses
    """

    classes: int
    points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75
    no_object: float = 0.1
    ce: float = 2.0
    mask: float = 5.0
    dice: float = 5.0

    def __call__(
        self, predictions: Sequence, targets: Sequence[Target], *, random: RandomPoints | None = None
    ) -> tuple[dict[str, Tensor], list[list[Match]]]:
        """Unweighted losses by name, and the matches of each prediction, in the order of `predictions`.

        predictions   with `logits` (B, Q, K + 1) and `masks` (B, Q, [T,] h, w), the final one last; the others' losses are called
                      loss_ce_0, loss_mask_0, loss_dice_0 and so on
        """
        random = random or uniform(predictions[-1].masks.device)
        count = instance_count(sum(len(t.labels) for t in targets), predictions[-1].masks)
        losses, matches = {}, {}
        last = len(predictions) - 1
        for i in (last, *range(last)):  # the published order, which is that of the random numbers
            matches[i] = self.match(predictions[i], targets, random)
            for name, loss in self.losses(predictions[i], targets, matches[i], count, random).items():
                losses[name if i == last else f"{name}_{i}"] = loss
        return losses, [matches[i] for i in range(len(predictions))]

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        weights = {"ce": self.ce, "mask": self.mask, "dice": self.dice}
        return sum(weights[name.split("_")[1]] * loss for name, loss in losses.items())

    @torch.no_grad()
    def match(self, prediction, targets: Sequence[Target], random: RandomPoints) -> list[Match]:
        """The cheapest one-to-one assignment in every image, or clip, on its own."""
        return [solve(self.costs(*item, random)) for item in zip(prediction.logits, prediction.masks, targets)]

    def costs(self, logits: Tensor, masks: Tensor, target: Target, random: RandomPoints) -> Tensor:
        """(Q, M) of logits (Q, K + 1) and masks (Q, [T,] h, w); all masks, and all frames, share their points."""
        points = random((1, self.points, 2))[0]
        dice, bce = mask_costs(masks.float(), target.masks.to(torch.float32), points)
        return self.ce * -logits.float().softmax(-1)[:, target.labels] + self.mask * bce + self.dice * dice

    def losses(
        self, prediction, targets: Sequence[Target], matches: Sequence[Match], count: float, random: RandomPoints
    ) -> dict[str, Tensor]:
        """loss_ce, loss_mask and loss_dice of one prediction; `count` divides the two of the masks."""
        return {
            "loss_ce": self.class_loss(prediction.logits, targets, matches),
            **self.mask_losses(*matched_masks(prediction.masks, targets, matches), count, random),
        }

    def class_loss(self, logits: Tensor, targets: Sequence[Target], matches: Sequence[Match]) -> Tensor:
        wanted = torch.full(logits.shape[:2], self.classes, dtype=torch.int64, device=logits.device)
        for row, target, (queries, found) in zip(wanted, targets, matches):
            row[queries] = target.labels[found]
        weight = logits.new_ones(self.classes + 1, dtype=torch.float32)
        weight[-1] = self.no_object
        return F.cross_entropy(logits.float().transpose(1, 2), wanted, weight)

    def mask_losses(self, logits: Tensor, truth: Tensor, count: float, random: RandomPoints, *, together: int = 1) -> dict[str, Tensor]:
        """Of matched pairs, logits (N, h, w) and truth (N, H, W).

        together   so many neighbouring rows (the frames of an instance) are one mask: its points are judged together
        """
        if not len(logits):
            return {"loss_mask": logits.sum() * 0, "loss_dice": logits.sum() * 0}
        points = self.uncertain_points(logits.detach(), random)
        x, y = (point_sample(m.float(), points).reshape(len(m) // together, -1) for m in (logits, truth))
        p = x.sigmoid()
        dice = 1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)
        bce = F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1)
        return {"loss_mask": bce.sum() / count, "loss_dice": dice.sum() / count}

    @torch.no_grad()
    def uncertain_points(self, logits: Tensor, random: RandomPoints) -> Tensor:
        """(N, P, 2): the candidates with the smallest |logit|, then fresh uniform ones."""
        chosen = int(self.importance * self.points)
        candidates = random((len(logits), int(self.points * self.oversample), 2))
        uncertainty = -point_sample(logits.float(), candidates).abs()
        index = uncertainty.topk(chosen, dim=1).indices
        picked = candidates.gather(1, index[..., None].expand(-1, -1, 2))
        return torch.cat([picked, random((len(logits), self.points - chosen, 2))], 1)


def uniform(device: torch.device) -> RandomPoints:
    return lambda shape: torch.rand(shape, device=device)


def solve(costs: Tensor) -> Match:
    """The assignment of least cost in (Q, M), by rising query."""
    rows, columns = linear_sum_assignment(costs.detach().float().cpu().nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).numpy())
    return tuple(torch.from_numpy(index).to(costs.device) for index in (rows, columns))


def matched_masks(masks: Tensor, targets: Sequence[Target], matches: Sequence[Match]) -> tuple[Tensor, Tensor]:
    """Masks (B, Q, [T,] h, w) and targets -> the pairs' logits (N, h, w) and truth (N, H, W), frames of a pair as neighbours."""
    logits = torch.cat([image[queries] for image, (queries, _) in zip(masks, matches)])
    truth = torch.cat([target.masks[found] for target, (_, found) in zip(targets, matches)])
    return logits.flatten(0, -3), truth.flatten(0, -3)


def instance_count(count: int, like: Tensor) -> float:
    """The mean over all processes of the number of instances, at least 1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = torch.tensor([float(count)], device=like.device)
        torch.distributed.all_reduce(total)
        count = total.item() / torch.distributed.get_world_size()
    return max(float(count), 1.0)
