# SPDX-License-Identifier: Apache-2.0
"""The criterion of Deformable DETR (Zhu et al., ICLR 2021), and so of the TransVOD systems: one-to-one matching, focal loss, boxes.

    predictions = model(images)                               # the frames of a clip, see the systems' `forward`
    losses, _ = criterion(predictions, [Target(labels, boxes)])    # TransVOD, TransVOD++: the first frame's; Lite: one of every frame
    criterion.total(losses).backward()

The published systems train a detector of single frames first (`TransVODSingle`), on `frame_predictions`, then what stands behind it
alone: `temporal_parameters`. They do so with a dropout of 0.1, which these networks leave out. The queries that take part there are chosen by the detector's class head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.deformable_detr import moved
from pyvseg.models.video_detector import Prediction, VideoDetector, to_corners
from pyvseg.training.set_criterion import Match, instance_count, solve

_EPS = 1e-8


class Target(NamedTuple):
    """What there is to find in one frame: labels (M,) int64 from 1 on, boxes (M, 4): centre x, y, width, height, as parts of the image."""

    labels: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class BoxCriterion:
    """`ce`, `bbox`, `giou`: weights of the three costs and losses; `alpha`, `gamma`: of the focal loss."""

    ce: float = 2.0
    bbox: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    def __call__(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> tuple[dict[str, Tensor], list[list[Match]]]:
        """Unweighted losses by name, and the matches of each prediction, in the order of `predictions`.

        predictions   the final one last; the others' losses are called loss_ce_0, loss_bbox_0, loss_giou_0 and so on
        """
        count = instance_count(sum(len(t.labels) for t in targets), predictions[-1].logits)
        losses, matches, last = {}, [], len(predictions) - 1
        for i, prediction in enumerate(predictions):
            matches.append(self.match(prediction, targets))
            for name, loss in self.losses(prediction, targets, matches[-1], count).items():
                losses[name if i == last else f"{name}_{i}"] = loss
        return losses, matches

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        weights = {"ce": self.ce, "bbox": self.bbox, "giou": self.giou}
        return sum(weights[name.split("_")[1]] * loss for name, loss in losses.items())

    @torch.no_grad()
    def match(self, prediction: Prediction, targets: Sequence[Target]) -> list[Match]:
        """The cheapest one-to-one assignment in every frame on its own."""
        return [solve(self.costs(*frame)) for frame in zip(*prediction, targets)]

    def costs(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """(Q, M) of logits (Q, K) and boxes (Q, 4)."""
        p, boxes = logits.float().sigmoid(), boxes.float()
        wrong = (1 - self.alpha) * p**self.gamma * -(1 - p + _EPS).log()
        right = self.alpha * (1 - p) ** self.gamma * -(p + _EPS).log()
        overlap = generalised_iou(to_corners(boxes)[:, None], to_corners(target.boxes)[None])
        return self.bbox * torch.cdist(boxes, target.boxes, p=1) + self.ce * (right - wrong)[:, target.labels] - self.giou * overlap

    def losses(self, prediction: Prediction, targets: Sequence[Target], matches: Sequence[Match], count: float) -> dict[str, Tensor]:
        """loss_ce, loss_bbox and loss_giou of one prediction, all divided by `count`."""
        boxes = torch.cat([frame[queries] for frame, (queries, _) in zip(prediction.boxes.float(), matches)])
        wanted = torch.cat([target.boxes[found] for target, (_, found) in zip(targets, matches)])
        return {
            "loss_ce": self.class_loss(prediction.logits, targets, matches) / count,
            "loss_bbox": (boxes - wanted).abs().sum() / count,
            "loss_giou": (1 - generalised_iou(to_corners(boxes), to_corners(wanted))).sum() / count,
        }

    def class_loss(self, logits: Tensor, targets: Sequence[Target], matches: Sequence[Match]) -> Tensor:
        """The sum of the focal loss (Lin et al., ICCV 2017)."""
        logits, wanted = logits.float(), torch.zeros_like(logits, dtype=torch.float32)
        for frame, target, (queries, found) in zip(wanted, targets, matches):
            frame[queries, target.labels[found]] = 1
        p = logits.sigmoid()
        miss = p * (1 - wanted) + (1 - p) * wanted
        weight = self.alpha * wanted + (1 - self.alpha) * (1 - wanted)
        return (weight * miss**self.gamma * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")).sum()


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """(...) of boxes (..., 4) as x1, y1, x2, y2 (Rezatofighi et al., CVPR 2019)."""
    area_a, area_b = ((box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b))
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    outer = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = area_a + area_b - inner
    return inner / union - (outer - union) / outer


def frame_predictions(model: VideoDetector, images: Tensor) -> list[Prediction]:
    """What every layer of the detector says of single frames (B, 3, H, W), the final one last."""
    detector = model.detector
    found = detector.layers(model.backbone(images)[-1])
    before = [detector.first_boxes().expand(len(images), -1, -1), *(each.boxes for each in found[:-1])]
    heads = zip(found, before, detector.class_embed, detector.bbox_embed)
    return [Prediction(classes(each.queries), moved(boxes, head(each.queries))) for each, boxes, classes, head in heads]


def temporal_parameters(model: VideoDetector) -> Iterator[nn.Parameter]:
    """What is trained in the second step: all that stands behind the detector of single frames."""
    return (p for name, p in model.named_parameters() if not name.startswith(("backbone.", "detector.")))


@torch.no_grad()
def cardinality_error(logits: Tensor, targets: Sequence[Target]) -> Tensor:
    """For logging: by how much the number of queries that are not of the last class misses the number of objects; a mean."""
    found = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
    return (found - found.new_tensor([len(t.labels) for t in targets])).abs().float().mean()


@torch.no_grad()
def class_error(logits: Tensor, targets: Sequence[Target], matches: Sequence[Match]) -> Tensor:
    """For logging: percent of the matched queries whose likeliest class is a wrong one."""
    found = torch.cat([frame[queries].argmax(-1) for frame, (queries, _) in zip(logits, matches)])
    wanted = torch.cat([target.labels[chosen] for target, (_, chosen) in zip(targets, matches)])
    return 100 * (found != wanted).float().mean() if len(wanted) else logits.new_tensor(100.0)
