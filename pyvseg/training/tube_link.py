# SPDX-License-Identifier: Apache-2.0
"""The criterion of Tube-Link (Li et al., ICCV 2023).

A step of the panoptic model takes two neighbouring tubes. Each gets the losses of `TubeCriterion`. Then the thing queries of the first are
linked (`Linker`) to those of the second, both are matched to the things once more (`TubeCriterion.match`), and the embeddings of those that got
one go through `quasi_dense_losses`, which weigh TRACK and TRACK_COSINE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyvseg.training.set_criterion import Match, RandomPoints, SetCriterion, Target, instance_count, uniform

TRACK, TRACK_COSINE = 0.25, 1.0


class Tall(NamedTuple):
    """Predictions whose frames stand on top of each other: logits (B, Q, K + 1), masks (B, Q, T * h, w)."""

    logits: Tensor
    masks: Tensor


@dataclass(frozen=True)
class TubeCriterion(SetCriterion):
    """`SetCriterion` on tubes: a tube counts as one tall image, so points at the border of two frames mix both, as published.

    things   the first classes are matched; every other class has a query of its own, the last of all. None: all are matched
    """

    things: int | None = None

    def __call__(self, predictions: Sequence, targets: Sequence[Target], *, random: RandomPoints | None = None) -> dict[str, Tensor]:
        """Unweighted losses by name: of the final prediction loss_cls, loss_mask, loss_dice, and of the others dI.loss_cls, ... or, where
        things and stuff part, dI.thing_loss_cls, dI.stuff_loss_cls, ...

        predictions   with `logits` (B, Q, K + 1) and `masks` (B, Q, T, h, w), the final one last
        targets       of B tubes, masks (M, T, H, W); stuff behind things, a target for each class
        """
        random = random or uniform(predictions[-1].masks.device)
        tall = [Tall(p.logits, p.masks.flatten(2, 3)) for p in predictions]
        truth = [Target(t.labels, t.masks.flatten(1, 2)) for t in targets]
        if self.things is None:
            parts = {"": [self._losses(p, truth, self.match(p, truth, random), random) for p in tall]}
        else:
            stuff, things = self._stuff(tall, truth, random), self._things(tall, truth, random)
            parts = {"stuff_": stuff, "thing_": things}
        losses = {name: sum(part[-1][name] for part in parts.values()) for name in ("loss_cls", "loss_mask", "loss_dice")}
        for prefix, part in parts.items():
            losses |= {f"d{i}.{prefix}{name}": loss for i, found in enumerate(part[:-1]) for name, loss in found.items()}
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return sum(self.weight(name) * loss for name, loss in losses.items())

    def weight(self, name: str) -> float:
        return {"cls": self.ce, "mask": self.mask, "dice": self.dice}[name.rsplit("_", 1)[1]]

    def _losses(self, prediction: Tall, targets: Sequence[Target], matches: Sequence[Match], random: RandomPoints) -> dict[str, Tensor]:
        count = instance_count(sum(len(queries) for queries, _ in matches), prediction.masks)
        losses = self.losses(prediction, targets, matches, count, random)
        return {"loss_cls": losses.pop("loss_ce"), **losses}

    def _stuff(self, predictions: Sequence[Tall], targets: Sequence[Target], random: RandomPoints) -> list[dict[str, Tensor]]:
        """As published, things too become the targets of stuff queries in a tube without stuff."""
        own = self.classes - self.things
        chosen = [Target(*(x[self._stuff_start(t) :] for x in t)) for t in targets]
        matches = [_by_class(t.labels - self.things, own) for t in chosen]
        return [self._losses(Tall(*(x[:, -own:] for x in p)), chosen, matches, random) for p in predictions]

    def _things(self, predictions: Sequence[Tall], targets: Sequence[Target], random: RandomPoints) -> list[dict[str, Tensor]]:
        own = self.classes - self.things
        chosen = [Target(*(x[t.labels < self.things] for x in t)) for t in targets]
        parts = [Tall(*(x[:, :-own] for x in p)) for p in predictions]
        return [self._losses(p, chosen, self.match(p, chosen, random), random) for p in parts]

    def _stuff_start(self, target: Target) -> int:
        things = int((target.labels < self.things).sum())
        return things if things < len(target.labels) else 0


def _by_class(numbers: Tensor, queries: int) -> Match:
    """The query of each target's number, counted from the end where that is negative; of several for a query the last one gets it."""
    taken = {int(n) % queries: i for i, n in enumerate(numbers.tolist())}
    rows = sorted(taken)
    return tuple(torch.tensor(x, dtype=torch.int64, device=numbers.device) for x in (rows, [taken[q] for q in rows]))
