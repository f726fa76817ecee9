# SPDX-License-Identifier: Apache-2.0
"""Matching costs of a training step: 100 queries against 20 instances, over sampled points and over whole tubes."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, on_gpu
from pyvseg.ops import mask_costs

N, M = 100, 20


def published(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mask2Former's two functions, on (N, P) and float (M, P)."""
    prob = logits.sigmoid()
    dice = 1 - (2 * torch.einsum("nc,mc->nm", prob, targets) + 1) / (prob.sum(-1)[:, None] + targets.sum(-1)[None, :] + 1)
    on = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="none")
    off = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="none")
    bce = torch.einsum("nc,mc->nm", on, targets) + torch.einsum("nc,mc->nm", off, 1 - targets)
    return dice, bce / logits.shape[1]


def identity(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Two products instead of three: BCE(x, t) = softplus(x) - x t."""
    prob = logits.sigmoid()
    dice = 1 - (2 * prob @ targets.T + 1) / (prob.sum(-1)[:, None] + targets.sum(-1) + 1)
    return dice, (F.softplus(logits).sum(-1)[:, None] - logits @ targets.T) / logits.shape[1]


def published_points(logits: Tensor, targets: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    def sample(masks: Tensor) -> Tensor:
        grid = 2 * points[None, :, None].repeat(len(masks), 1, 1, 1) - 1
        return F.grid_sample(masks.float(), grid, align_corners=False)[..., 0].flatten(1)

    return published(sample(logits), sample(targets))


def masks(*size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, *size) * 3 - 2, torch.rand(M, *size) < 0.1


def traffic(logits: Tensor, targets: Tensor) -> dict[str, float]:
    read = logits.nbytes + targets.nbytes
    return {"bytes": float(read), "flops": 4.0 * N * M * logits[0].numel()}  # not counted: one exponential and one logarithm each


def case(name: str, logits: Tensor, targets: Tensor, quick: bool) -> Case:
    x, t = logits.flatten(1), targets.flatten(1)
    half = x.bfloat16()
    ways: dict[str, Callable] = {
        "published": lambda: published(x, t.float()),
        "softplus identity": lambda: identity(x, t.float()),
        "pyvseg": lambda: mask_costs(x, t),
        "pyvseg bfloat16": lambda: mask_costs(half, t),
    }
    if not quick:
        for way, function in (("published", published), ("softplus identity", identity)):
            compiled = torch.compile(function, dynamic=False)
            ways[f"{way}, torch.compile"] = lambda compiled=compiled: compiled(x, t.float())
    return Case("mask_cost", name, ways, **traffic(x, t), bars={("pyvseg", "published"): 10}, way_bytes={"pyvseg bfloat16": half.nbytes + t.nbytes})


def sampled(name: str, size: tuple[int, int], K: int) -> Case:
    logits, targets = masks(1, *size)[0], torch.rand(M, 1, 4 * size[0], 4 * size[1]) < 0.1
    points = torch.rand(K, 2)
    ways = {"published": lambda: published_points(logits, targets, points), "pyvseg": lambda: mask_costs(logits, targets, points)}
    reads = 4.0 * (N + M) * K * 4 + 8 * K
    return Case("mask_cost", name, ways, reads, 4.0 * N * M * K, bars={("pyvseg", "published"): 5})


def trained(name: str, logits: Tensor, targets: Tensor) -> Case:
    x, t = logits.flatten(1).requires_grad_(), targets.flatten(1)

    def run(function: Callable) -> None:
        x.grad = None
        dice, bce = function()
        (dice + bce).sum().backward()

    ways = {"published": lambda: run(lambda: published(x, t.float())), "pyvseg": lambda: run(lambda: mask_costs(x, t))}
    counts = traffic(x, t)
    return Case("mask_cost", name, ways, 3 * counts["bytes"], 3 * counts["flops"], bars={("pyvseg", "published"): 5})


def cases(quick: bool) -> Iterator[Case]:
    yield case(f"{N} x {M}, 25,088 points", *masks(25088), quick)
    yield case(f"{N} x {M}, tubes of 5 x 120 x 214", *masks(5, 120, 214), quick)
    yield sampled(f"{N} x {M}, 12,544 points sampled from 120 x 216 and 480 x 864", (120, 216), 12544)
    yield trained(f"{N} x {M}, 25,088 points, forward and backward", *masks(25088))
    if not quick:
        yield case(f"{N} x {M}, 720p tubes of 5 x 180 x 320", *masks(5, 180, 320), True)
    if on_gpu():
        yield case(f"{N} x {M}, 1080p tubes of 5 x 270 x 480", *masks(5, 270, 480), True)
        yield case(f"{N} x {M}, tubes of 16 x 120 x 214", *masks(16, 120, 214), True)
