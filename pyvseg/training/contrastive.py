# SPDX-License-Identifier: Apache-2.0
"""The contrastive loss of CTVIS (Ying et al., ICCV 2023): a clip is walked as the tracker walks a video, and every instance's
embedding is pulled to what the memory would hold of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg.training.set_criterion import Match, RandomPoints, SetCriterion, Target


def match_frames(criterion: SetCriterion, prediction, clips: Sequence[Target], random: RandomPoints) -> list[list[Match]]:
    """Frame by frame and in it clip by clip, the queries of all instances of the clips, absent ones too.

    prediction   of B * T frames, clip by clip
    clips        labels (N,), masks (N, T, H, W)
    """
    frames = clips[0].masks.shape[1]
    logits, masks = (x.detach().unflatten(0, (len(clips), frames)) for x in (prediction.logits, prediction.masks))
    targets = [[Target(clip.labels, clip.masks[:, t]) for clip in clips] for t in range(frames)]
    return [criterion.match(type(prediction)(logits[:, t], masks[:, t]), targets[t], random) for t in range(frames)]


def contrastive_losses(
    embeddings: Tensor, matches: list[list[Match]], present: Sequence[Tensor], *, coin: Callable[[], float]
) -> tuple[Tensor, Tensor]:
    """Means over all pairs of instance and frame of the contrastive and of the cosine loss, unweighted.

    embeddings   (B * T, Q, C), clip by clip
    matches      of `match_frames`
    present      (N, T) bool for each clip
    coin         a uniform number; up to 0.5 the last embedding is the positive, above it the momentum
    """
    clips = embeddings.unflatten(0, (len(present), -1))
    items = []
    for b, (clip, visible) in enumerate(zip(clips, present)):
        query = torch.stack([_by_target(frame[b]) for frame in matches], 1)  # (N, T)
        for row, there in zip(query.tolist(), visible.tolist()):
            items += _walk(clip, row, there, coin)
    if not items:
        return embeddings.sum() * 0, embeddings.sum() * 0
    return tuple(torch.stack(losses).mean() for losses in zip(*items))


def _by_target(match: Match) -> Tensor:
    """The query of each target."""
    queries, targets = match
    return queries[targets.argsort()]


def _walk(clip: Tensor, query: list[int], present: list[bool], coin: Callable[[], float]) -> list[tuple[Tensor, Tensor]]:
    """One instance through its clip (T, Q, C): losses of each frame after the first where it is present."""
    anchors = [frame[q] if there else None for frame, q, there in zip(clip, query, present)]
    momenta = _momenta(anchors)
    losses = []
    for f in range(1, len(anchors)):
        if anchors[f] is None:
            continue
        positive = _positive(anchors, momenta, f, coin)
        if positive is not None:
            before = clip[f - 1]
            negatives = before if anchors[f - 1] is None else torch.cat([before[: query[f - 1]], before[query[f - 1] + 1 :]])
            losses.append(_losses(anchors[f], positive, negatives))
    return losses


def _momenta(anchors: list[Tensor | None]) -> list[Tensor | None]:
    """The embedding that memory holds after each frame: the more a new anchor resembles the earlier ones, the more it counts."""
    momenta, seen = [], []
    for anchor in anchors:
        if anchor is None:
            momenta.append(momenta[-1] if momenta else None)
        elif not seen:
            momenta.append(anchor)
        else:
            share = F.cosine_similarity(torch.stack(seen), anchor[None], dim=-1).mean().clamp(min=0)
            momenta.append((1 - share) * momenta[-1] + share * anchor)
        seen += [] if anchor is None else [anchor]
    return momenta


def _positive(anchors: list[Tensor | None], momenta: list[Tensor | None], f: int, coin: Callable[[], float]) -> Tensor | None:
    earlier = [a for a in anchors[:f] if a is not None]
    if earlier:
        return momenta[f - 1] if coin() > 0.5 else earlier[-1]
    later = [a for a in anchors[f + 1 :] if a is not None]
    absent = len(anchors) - f - 1 - len(later)
    # Published is a comparison of the number of absences with f, where that of the later frames was meant.
    return later[0] if later and absent != f else None


def _losses(x: Tensor, positive: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    reid = torch.logsumexp(torch.cat([x.new_zeros(1), negatives @ x - positive @ x]), 0)
    candidates = torch.cat([positive[None], negatives])
    wanted = torch.zeros(len(candidates), device=x.device)
    wanted[0] = 1
    return reid, (F.cosine_similarity(candidates, x[None], dim=-1) - wanted).square().mean()
