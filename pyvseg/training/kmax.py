# SPDX-License-Identifier: Apache-2.0
"""The criterion of kMaX-DeepLab (Yu et al., ECCV 2022) and Video-kMaX (Shin et al., WACV 2024).

A clip is one image here: the masks of its T frames stand below one another, (N, T * h, w). One step of training:

    predictions = predictions_of(model, model.encode(images).split())    # the T frames of a clip (T, 3, H, W)
    losses, _ = criterion(predictions, [clip_target(labels, masks, semantic)])
    criterion.total(losses).backward()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyvseg.layers.kmax_decoder import FramePixels
from pyvseg.layers.kmax_pixel_decoder import resize
from pyvseg.models.kmax import KMaX
from pyvseg.training.set_criterion import Match, RandomPoints, uniform

_EPS = 1e-5


class Prediction(NamedTuple):
    """logits (B, N, K + 1), masks (B, N, H, W) logits, features (B, D, H, W) of length 1."""

    logits: Tensor
    masks: Tensor
    features: Tensor


class Target(NamedTuple):
    """labels (M,), masks (M, H, W) bool that do not overlap, semantic (H, W) int64, -1 = void."""

    labels: Tensor
    masks: Tensor
    semantic: Tensor


def clip_target(labels: Tensor, masks: Tensor, semantic: Tensor) -> Target:
    """Of a clip: labels (M,), masks (M, T, H, W) bool and semantic (T, H, W) at the network's size; every fourth row and column is used."""
    return Target(labels, masks[..., ::4, ::4].flatten(1, 2), semantic[..., ::4, ::4].flatten(0, 1))


def predictions_of(model: KMaX, frames: Sequence[FramePixels]) -> list[Prediction]:
    """What every layer says of the frames of B clips, the final one last, all at stride 4. The model in training mode.

    Images that are no clips: `[model.encode(images)]`. Of a clip the frames are encoded together, `model.encode(images).split()`:
    its batch norms see all of them.
    """
    final, layers = model.decoder(frames, auxiliary=True)
    size = final.pixels[0].shape[2:]
    fit = lambda maps: torch.cat([resize(m, size, size[0]) for m in maps], 2)  # noqa: E731
    each = [(layer.prediction, layer.masks) for layer in layers] + [(final, model.decoder.predictor.dense_masks(final))]
    return [Prediction(p.logits, fit(masks), fit([p.features(t) for t in range(len(frames))])) for p, masks in each]


class Matched(NamedTuple):
    """What all layers of one image are judged by; the final prediction decides.

    match         queries and their targets
    labels        of these
    dice, score   of the pairs: overlap and class probability
    weight        (N,) of the class loss
    masks         (N, H, W) float, the wanted mask of each query
    valid         (H, W) bool, False where nothing is annotated
    """

    match: Match
    labels: Tensor
    dice: Tensor
    score: Tensor
    weight: Tensor
    masks: Tensor
    valid: Tensor


@dataclass(frozen=True)
class KMaXCriterion:
    """Weights and numbers of the published configurations.

    ce, dice, mask, contrast, semantic   weights of the losses
    pixels, semantic_pixels   sampled for the pixel contrast and for the semantic loss, 0: all
    dice_count    what the dice loss is divided by: a constant 128 in Video-kMaX, None: the number of queries
    """

    classes: int
    ce: float = 1.0
    dice: float = 3.0
    mask: float = 0.3
    contrast: float = 1.0
    semantic: float = 0.0
    pixels: int = 4096
    semantic_pixels: int = 4096
    temperature: float = 1.5
    semantic_temperature: float = 2.0
    contrast_temperature: float = 0.3
    real: float = 0.75
    void: float = 0.25
    dice_count: int | None = 128

    def __call__(
        self,
        predictions: Sequence[Prediction],
        targets: Sequence[Target],
        semantic: Tensor | None = None,
        *,
        random: RandomPoints | None = None,
    ) -> tuple[dict[str, Tensor], list[Matched]]:
        """Unweighted losses by name, and what the images were matched to.

        predictions   the final one last; the others' losses are called loss_ce_0 and so on
        semantic      logits (B, K + 1, H, W) of the auxiliary head
        random        uniform numbers in [0, 1); a 0 is never sampled
        """
        random = random or uniform(predictions[-1].masks.device)
        matched = [self.match(*item) for item in zip(*predictions[-1][:2], targets)]
        losses = self.losses(predictions[-1], matched, random)
        if semantic is not None:
            losses["loss_aux_semantic"] = self.semantic_loss(semantic, targets, matched, random)
        for i, prediction in enumerate(predictions[:-1]):
            losses |= {f"{name}_{i}": loss for name, loss in self.losses(prediction, matched, random).items()}
        return losses, matched

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        weights = {"ce": self.ce, "dice": self.dice, "mask": self.mask, "pixel": self.contrast, "aux": self.semantic}
        return sum(weights[name.split("_")[1]] * loss for name, loss in losses.items())

    @torch.no_grad()
    def match(self, logits: Tensor, masks: Tensor, target: Target) -> Matched:
        """Of one image: the pairs of largest overlap times class probability."""
        wanted = target.masks.to(torch.float32)
        valid = wanted.sum(0) > 0
        share = masks.float().softmax(0) * valid
        inside = share.flatten(1) @ wanted.flatten(1).T
        dice = inside / ((share.flatten(1).sum(1)[:, None] + wanted.flatten(1).sum(1)) / 2 + _EPS)
        score = logits.float().softmax(-1)[:, target.labels]
        cost = -(dice * score)
        rows, columns = linear_sum_assignment(cost.nan_to_num(nan=1e5).cpu().numpy())
        rows, columns = (torch.from_numpy(x).to(masks.device) for x in (rows, columns))
        every = masks.float().softmax(0)
        weight = (every * ~valid).flatten(1).sum(1) / (every.flatten(1).sum(1) + _EPS)
        weight[rows] = dice[rows, columns]
        of_query = wanted.new_zeros(masks.shape)
        of_query[rows] = wanted[columns]
        return Matched((rows, columns), target.labels[columns], dice[rows, columns], score[rows, columns], weight.clamp(min=_EPS), of_query, valid)

    def losses(self, prediction: Prediction, matched: Sequence[Matched], random: RandomPoints) -> dict[str, Tensor]:
        """loss_ce, loss_dice, loss_mask and loss_pixel_insdis of one prediction."""
        items = list(zip(prediction.logits.float(), prediction.masks.float(), matched))
        areas = torch.stack([_areas(m) for m in matched])
        chosen = sample(areas, self.temperature, self.pixels, random)
        contrast = [self._contrast(f, m, k) for f, m, k in zip(prediction.features.float(), matched, chosen)]
        return {
            "loss_ce": _mean([self._class_loss(logits, m) for logits, _, m in items]),
            "loss_dice": _mean([self._dice_loss(masks, m) for _, masks, m in items]),
            "loss_mask": _mean([_over_nonzero(_mask_loss(masks, m)) for _, masks, m in items]),
            "loss_pixel_insdis": _over_nonzero(torch.cat(contrast)),
        }

    def _class_loss(self, logits: Tensor, matched: Matched) -> Tensor:
        wanted = torch.full(logits.shape[:1], self.classes, device=logits.device)
        wanted[matched.match[0]] = matched.labels
        balance = torch.where(wanted == self.classes, self.void, self.real)
        return _over_nonzero(F.cross_entropy(logits, wanted, reduction="none") * balance * matched.weight)

    def _dice_loss(self, masks: Tensor, matched: Matched) -> Tensor:
        queries = matched.match[0]
        share, wanted = ((x[queries]).flatten(1) for x in (masks.softmax(0) * matched.valid, matched.masks))
        dice = 1 - (2 * (share * wanted).sum(1) + 1) / (share.sum(1) + wanted.sum(1) + 1)
        return (dice * matched.score.clamp(min=_EPS)).sum() * self.real / (self.dice_count or len(masks))

    def _contrast(self, features: Tensor, matched: Matched, pixels: Tensor) -> Tensor:
        """Cross entropy of each sampled pixel's similarities to the others, (K,); wanted are the pixels of its own segment."""
        f, g = (x.flatten(1)[:, pixels] for x in (features, matched.masks))
        same = g.T @ g
        return F.cross_entropy(f.T @ f / self.contrast_temperature, same / same.sum(0, keepdim=True).clamp(min=1), reduction="none")

    def semantic_loss(self, logits: Tensor, targets: Sequence[Target], matched: Sequence[Matched], random: RandomPoints) -> Tensor:
        """loss_aux_semantic of logits (B, K + 1, H, W)."""
        truth = torch.stack([t.semantic for t in targets]).flatten(1)
        logits = logits.float().flatten(2)
        if self.semantic_pixels:
            chosen = sample(torch.stack([_areas(m) for m in matched]), self.semantic_temperature, self.semantic_pixels, random)
            truth, logits = truth.gather(1, chosen), logits.gather(2, chosen[:, None].expand(-1, logits.shape[1], -1))
        return _over_nonzero(F.cross_entropy(logits, truth, ignore_index=-1, reduction="none"))


def sample(areas: Tensor, temperature: float, count: int, random: RandomPoints) -> Tensor:
    """Pixels (B, count) drawn without replacement: the smaller the segment of areas (B, P), 0 = void, the likelier."""
    scores = temperature * (areas.shape[1] / areas.clamp(min=1)).log()
    scores = torch.where(areas > 0, scores, -32768.0)
    return (scores - (-random(tuple(areas.shape)).log()).log()).topk(count).indices


def _areas(matched: Matched) -> Tensor:
    """(P,): the area of every pixel's segment, 0 for void."""
    masks = matched.masks.flatten(1)
    return masks.sum(1) @ masks


def _mask_loss(masks: Tensor, matched: Matched) -> Tensor:
    """Cross entropy over the queries at the pixels that are annotated."""
    return F.cross_entropy(masks.flatten(1).T[matched.valid.flatten()], matched.masks.argmax(0)[matched.valid], reduction="none")


def _over_nonzero(losses: Tensor) -> Tensor:
    return losses.sum() / losses.count_nonzero().clamp(min=1)


def _mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()
