# SPDX-License-Identifier: Apache-2.0
"""The losses of quasi-dense similarity learning (Pang et al., CVPR 2021), with which trackers learn to tell objects apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN, HARDEST = 0.1, 3  # of the cosine of two objects; such pairs, the hardest, for each pair of one object


def quasi_dense_losses(key: Tensor, reference: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Contrastive and cosine loss, unweighted, of embeddings (N, C) and (M, C); `same` (N, M) bool says which are one object."""
    return contrastive_loss(key @ reference.T, same), cosine_loss(F.normalize(key, dim=1) @ F.normalize(reference, dim=1).T, same)


def contrastive_loss(similarity: Tensor, same: Tensor) -> Tensor:
    """log(1 + the sum over all pairs of a positive and a negative of exp(negative - positive)): mean of the rows of (N, M) with a positive."""
    pairs = same[:, :, None] & ~same[:, None]
    excess = torch.where(pairs, similarity[:, None] - similarity[:, :, None], -torch.inf).flatten(1)
    rows = torch.logsumexp(F.pad(excess, (0, 1)), 1)
    found = same.any(1)
    return (rows * found).sum() / found.sum().clamp(min=1)


def cosine_loss(cosine: Tensor, same: Tensor) -> Tensor:
    """Mean squared distance of (N, M) cosines from 1 for the same object and from 0 for others, of these only the hardest where they are many."""
    cost = (torch.where(same, cosine, cosine - MARGIN).clamp(0, 1) - same.float()).square()
    positives, negatives = cost[same], cost[~same]
    if len(negatives) > HARDEST * (len(positives) + 1):
        negatives = negatives[negatives.detach().topk(HARDEST * len(positives)).indices]
    counted = torch.cat([positives, negatives])
    return counted.sum() / max(len(counted), 1)
