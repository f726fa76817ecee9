# SPDX-License-Identifier: Apache-2.0
"""Object-level matching of online trackers: embeddings of a frame or clip against a memory of tracks."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg.ops import _dispatch

__all__ = ["greedy_assignment", "hungarian_assignment", "memory_match"]

METRICS = ("dot", "cosine", "softmax", "bisoftmax")


def memory_match(
    embeddings: Tensor,  # (*B, N, C)
    memory: Tensor,  # (*B, M, C)
    metric: str = "bisoftmax",
    *,
    labels: Tensor | None = None,  # (*B, N) integers
    memory_labels: Tensor | None = None,  # (*B, M)
    locations: Tensor | None = None,  # (*B, N, D), boxes for instance
    memory_locations: Tensor | None = None,  # (*B, M, D)
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:  # (*B, N, M), float32
    """How well every embedding fits every track.

    "dot" and "cosine" (MinVIS, Tube-Link) are the products of the embeddings and of the normalised embeddings; "softmax" is
    the softmax of the products over the memory; "bisoftmax" (CTVIS, quasi-dense trackers) the mean of the softmax over the
    memory and the softmax over the embeddings.
    With labels, scores of different labels are multiplied by 0 (after the softmax, as quasi-dense trackers do). With
    locations, scores are multiplied by exp(-|location - memory location| / temperature), Euclidean, as in HiLA-MB.

    All is float32, whatever the inputs' dtype (float64 stays). A saturated bisoftmax is exactly 0.5: compare with `>`.
    Differentiable in embeddings, memory and locations, deterministic. Without tracks or embeddings the result is empty.

    Raises ValueError for shapes, devices or metric, TypeError for dtypes, naming the argument.
    """
    choice = _plan(embeddings, memory, metric, labels, memory_labels, locations, memory_locations, temperature, backend)
    if choice == "reference":
        scores = reference(embeddings, memory, metric, labels, memory_labels)
    else:
        own, theirs = (labels, memory_labels) if labels is None else (labels.long(), memory_labels.long())
        scores = _dispatch.call(choice, "memory_match", embeddings, memory, own, theirs)
    if locations is None:
        return scores
    distance = torch.cdist(locations.to(scores.dtype), memory_locations.to(scores.dtype), compute_mode="donot_use_mm_for_euclid_dist")
    return scores * (-distance / temperature).exp()


def reference(embeddings: Tensor, memory: Tensor, metric: str, labels: Tensor | None = None, memory_labels: Tensor | None = None) -> Tensor:
    """The definition in PyTorch, without locations."""
    e, m = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (embeddings, memory))
    if metric == "cosine":
        e, m = F.normalize(e, dim=-1), F.normalize(m, dim=-1)
    scores = e @ m.mT
    if metric == "softmax":
        scores = scores.softmax(-1)
    if metric == "bisoftmax":
        scores = (scores.softmax(-1) + scores.softmax(-2)) / 2
    return scores if labels is None else scores * (labels.unsqueeze(-1) == memory_labels.unsqueeze(-2))


def greedy_assignment(
    scores: Tensor,  # (*B, N, M)
    threshold: float,
    *,
    weights: Tensor | None = None,  # (*B, M)
    claims: Tensor | None = None,  # bool, broadcastable to (*B, N, M)
) -> Tensor:  # (*B, N) int64 on the CPU
    """The track of each embedding, in the order of the rows; -1 where no score is above the threshold.

    A row takes the largest of its scores above the threshold that no earlier row has taken, of equal ones the first; a track
    taken scores 0 for all other rows. With `weights` (CTVIS: how many frames a track was seen in) the largest score * weight
    decides among those above the threshold.
    `claims` says which rows may take which tracks: a match that may not is returned but leaves the track free (quasi-dense
    trackers: detections of low confidence, and backdrops, which are no tracks).

    The scores are copied to the host once; weights and claims are best there already. NaN is no match.
    Raises ValueError for shapes or a negative threshold, TypeError for dtypes, naming the argument.
    """
    scores = _on_host(scores)
    *batch, N, M = scores.shape
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, which a taken track scores, got {threshold}")
    if weights is not None and weights.shape != (*batch, M):
        raise ValueError(f"weights must be {(*batch, M)} to go with scores, got shape {tuple(weights.shape)}")
    if claims is not None and claims.dtype != torch.bool:
        raise TypeError(f"claims must be bool, got {claims.dtype}")
    B = math.prod(batch)
    weights = None if weights is None else weights.detach().to("cpu", torch.float32).reshape(B, M)
    claims = None if claims is None else claims.cpu().expand(scores.shape).reshape(B, N, M)
    match = reference_greedy if _dispatch.missing("memory_match", "cpu") else torch.ops.pyvseg.greedy_assignment
    return match(scores.reshape(B, N, M), threshold, weights, claims).reshape(*batch, N)


def reference_greedy(scores: Tensor, threshold: float, weights: Tensor | None, claims: Tensor | None) -> Tensor:
    """The definition row by row; shapes as in `greedy_assignment` with one batch dimension."""
    match = torch.full(scores.shape[:2], -1)
    for b, rows in enumerate(scores.clone()):
        for i, row in enumerate(rows):
            above = row > threshold
            if above.any():
                match[b, i] = j = (row if weights is None else row * weights[b]).masked_fill(~above, -torch.inf).argmax()
                if claims is None or claims[b, i, j]:
                    rows[:, j] = 0
    return match


def hungarian_assignment(
    scores: Tensor,  # (*B, N, M)
    threshold: float | None = None,
) -> Tensor:  # (*B, N) int64 on the CPU
    """The one-to-one assignment of largest total score: the column of each row, -1 for rows left over (N > M).

    With a threshold, pairs that score no more than it are taken apart afterwards, as in HiLA-MB. Among equal totals the
    orientation decides: MinVIS and Tube-Link give the tracks as rows and the current embeddings as columns.

    The scores are copied to the host once. A pair of NaN or infinite score is the last resort and never returned.
    Raises ValueError for shapes, TypeError for dtypes, naming the argument.
    """
    from scipy.optimize import linear_sum_assignment  # here: kernels run where only torch is

    scores = _on_host(scores)
    *batch, N, M = scores.shape
    match = torch.full((math.prod(batch), N), -1)
    for into, problem in zip(match.numpy(), scores.reshape(len(match), N, M).numpy()):
        usable = np.isfinite(problem)
        low, high = problem.min(where=usable, initial=0), problem.max(where=usable, initial=0)
        last_resort = float(low) - (float(high) - float(low) + 1) * min(N, M)
        rows, columns = linear_sum_assignment(np.where(usable, problem, last_resort), maximize=True)
        kept = usable[rows, columns] if threshold is None else usable[rows, columns] & (problem[rows, columns] > threshold)
        into[rows[kept]] = columns[kept]
    return match.reshape(*batch, N)


def _on_host(scores: Tensor) -> Tensor:
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(f"scores must be a floating-point tensor, got {getattr(scores, 'dtype', type(scores).__name__)}")
    if scores.ndim < 2:
        raise ValueError(f"scores must be (*B, N, M), got shape {tuple(scores.shape)}")
    return scores.detach().to("cpu", torch.float32)


@_dispatch.planned
def _plan(embeddings, memory, metric, labels, memory_labels, locations, memory_locations, temperature, backend) -> str:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    for name, tensor in (("embeddings", embeddings), ("memory", memory)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
        if tensor.ndim < 2:
            raise ValueError(f"{name} must be (*B, N, C), got shape {tuple(tensor.shape)}")
    if memory.dtype != embeddings.dtype:
        raise TypeError(f"memory must have embeddings' dtype {embeddings.dtype}, got {memory.dtype}")
    *batch, N, C = embeddings.shape
    M = memory.shape[-2]
    if memory.shape != (*batch, M, C):
        raise ValueError(f"memory must be {(*batch, 'M', C)} to go with embeddings, got shape {tuple(memory.shape)}")
    if (labels is None) != (memory_labels is None) or (locations is None) != (memory_locations is None):
        raise ValueError("labels and memory_labels go together, and so do locations and memory_locations")
    for name, tensor, rows in (("labels", labels, N), ("memory_labels", memory_labels, M)):
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"{name} must be a tensor of integers, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
        if tensor is not None and tensor.shape != (*batch, rows):
            raise ValueError(f"{name} must be {(*batch, rows)}, got shape {tuple(tensor.shape)}")
    for name, tensor, rows in (("locations", locations, N), ("memory_locations", memory_locations, M)):
        if tensor is not None and (not isinstance(tensor, Tensor) or not tensor.is_floating_point()):
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
        if tensor is not None and (tensor.shape[:-1] != (*batch, rows) or tensor.shape[-1:] != locations.shape[-1:]):
            raise ValueError(f"{name} must be {(*batch, rows, 'D')}, got shape {tuple(tensor.shape)}")
    for name, tensor in (("memory", memory), ("labels", labels), ("memory_labels", memory_labels),
                         ("locations", locations), ("memory_locations", memory_locations)):  # fmt: skip
        if tensor is not None and tensor.device != embeddings.device:
            raise ValueError(f"{name} is on {tensor.device} but embeddings on {embeddings.device}")
    choice = _dispatch.choose("memory_match", backend, embeddings, memory, slower="2 to 5 times", few=math.inf)
    return choice if metric == "bisoftmax" else "reference"


@_dispatch.register_fake("memory_match")
def _fake(embeddings: Tensor, memory: Tensor, labels: Tensor | None, memory_labels: Tensor | None) -> Tensor:
    return embeddings.new_empty(*embeddings.shape[:-1], memory.shape[-2], dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    embeddings, memory, labels, memory_labels = ctx.saved_tensors
    e, m = embeddings.float(), memory.float()
    scores = e @ m.mT
    if labels is not None:
        grad = grad * (labels.unsqueeze(-1) == memory_labels.unsqueeze(-2))
    by_scores = torch.zeros_like(scores)
    for dim in (-1, -2):
        share = scores.softmax(dim)
        by_scores += share * (grad - (grad * share).sum(dim, keepdim=True)) / 2
    return (by_scores @ m).to(embeddings.dtype), (by_scores.mT @ e).to(memory.dtype), None, None


_dispatch.register_autograd("memory_match", _backward, setup_context=_save)
