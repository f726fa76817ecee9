# SPDX-License-Identifier: Apache-2.0
"""One frame of an online tracker: detections against its memory of tracks, and the greedy pass that follows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case
from pyvseg.ops import greedy_assignment, memory_match
from pyvseg.ops.memory_match import reference

C = 256


def published_greedy(scores: Tensor, frames: Tensor, threshold: float = 0.3) -> list[int]:
    """CTVIS's loop."""
    scores, match = scores.clone(), []
    for i in range(len(scores)):
        valid = torch.nonzero(scores[i] > threshold).flatten()
        row = scores[i].clone()
        if len(valid) > 1:
            weight = torch.full_like(row, frames[valid].mean())
            weight[valid] = frames[valid]
            row = row * weight
        best, j = row.max(0)
        match.append(int(j) if best > threshold else -1)
        if match[-1] >= 0:
            scores[:i, j] = 0
            scores[i + 1 :, j] = 0
    return match


def scored(n: int, m: int, quick: bool) -> Case:
    embeddings, memory = torch.randn(n, C) / 4, torch.randn(m, C) / 4
    labels, memory_labels = torch.randint(0, 40, (n,)), torch.randint(0, 40, (m,))
    half = embeddings.bfloat16(), memory.bfloat16()
    ways = {
        "published": lambda: reference(embeddings, memory, "bisoftmax", labels, memory_labels),
        "pyvseg": lambda: memory_match(embeddings, memory, labels=labels, memory_labels=memory_labels),
        "pyvseg bfloat16": lambda: memory_match(*half, labels=labels, memory_labels=memory_labels),
    }
    if not quick:
        compiled = torch.compile(lambda e, m, a, b: reference(e, m, "bisoftmax", a, b), dynamic=False)
        ways["published, torch.compile"] = lambda: compiled(embeddings, memory, labels, memory_labels)
    traffic = 4.0 * (n * C + m * C + n * m) + 8.0 * (n + m)
    return Case("memory_match", f"bisoftmax of {n} x {m}, same label", ways, traffic, 2.0 * n * m * C, bars={("pyvseg", "published"): 1})


def greedy(n: int, m: int) -> Case:
    scores, frames = torch.rand(n, m) * 0.6, torch.randint(1, 50, (m,)).float()
    ways = {"published": lambda: published_greedy(scores, frames), "pyvseg": lambda: greedy_assignment(scores, 0.3, weights=frames)}
    return Case("memory_match", f"greedy assignment of {n} x {m}", ways, 4.0 * n * m, 2.0 * n * m, bars={("pyvseg", "published"): 10})


def cases(quick: bool) -> Iterator[Case]:
    for n, m in ((30, 60), (100, 100), (100, 300)):
        yield scored(n, m, quick)
    yield greedy(60, 200)
