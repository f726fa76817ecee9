# SPDX-License-Identifier: Apache-2.0
"""The criterion of semi-supervised training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def aggregated_logits(probabilities: Tensor) -> Tensor:
    """Independent object probabilities (B, O, ...) -> logits (B, O + 1, ...), background first, whose softmax is the soft aggregation."""
    p = probabilities.float()
    p = torch.cat([(1 - p).prod(1, keepdim=True), p], 1).clamp(1e-7, 1 - 1e-7)
    return torch.log(p / (1 - p))


@dataclass(frozen=True)
class BootstrappedCrossEntropy:
    """Cross entropy over the hardest pixels, whose share falls from all to `top_share` (STCN).

    Before iteration `start` every pixel counts; between `start` and `end` the share falls linearly.
    """

    start: int = 20_000
    end: int = 70_000
    top_share: float = 0.15

    def share(self, iteration: int) -> float:
        if iteration < self.start:
            return 1.0
        left = max(self.end - iteration, 0) / (self.end - self.start)
        return self.top_share + (1 - self.top_share) * left

    def __call__(self, logits: Tensor, target: Tensor, objects: Tensor, iteration: int) -> Tensor:
        """logits (B, O + 1, H, W), target (B, H, W) of classes 0..O, objects (B,) how many of them exist -> scalar mean over B."""
        share = self.share(iteration)
        losses = []
        for scores, truth, count in zip(logits, target, objects.tolist()):
            loss = F.cross_entropy(scores[None, : count + 1], truth[None], reduction="none").flatten()
            losses.append(loss.mean() if share == 1 else loss.topk(int(loss.numel() * share)).values.mean())
        return torch.stack(losses).mean()
