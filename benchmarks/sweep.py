# SPDX-License-Identifier: Apache-2.0
"""Is an op slower than plain PyTorch at some size? Random problems, from a handful of elements to real ones.

    python -m benchmarks.sweep [op...] --shapes 100 --seed 0

Ours runs as users call it, with all checks and the automatic choice of backend; in turn with it run the bare PyTorch
formulations, of which the quickest counts. What seems slower is measured again, longer, before it counts as a loss.
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ops.kmeans_attn import published as published_kmeans
from benchmarks.ops.mask_iou import matmul
from pyvseg import ops
from pyvseg.ops.kernel_update import _LINEARS, _NORMS, reference_pool, reference_update
from pyvseg.ops.kmeans_attn import reference as reference_kmeans
from pyvseg.ops.mask_cost import reference as reference_costs
from pyvseg.ops.memory_match import reference as reference_match
from pyvseg.ops.memory_read import reference as reference_read
from pyvseg.ops.ms_deform_attn import reference as reference_attention
from pyvseg.ops.point_sample import reference as reference_sample

SHORT = 20e-6  # seconds; calls so short scatter by a tenth from run to run
LEVEL, LEVEL_SHORT = 0.95, 0.9  # least speed against PyTorch that counts as level
Run = Callable[[], object]


@dataclass(frozen=True)
class Problem:
    name: str
    ours: Run
    theirs: tuple[Run, ...]  # the same in PyTorch


class Draw:
    """Random sizes, dtypes and tensors."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)

    def size(self, low: int, high: int) -> int:
        """Log-uniform."""
        return round(math.exp(self.random.uniform(math.log(low), math.log(high))))

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def dtype(self) -> torch.dtype:
        return self.random.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))

    def tensor(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Contiguous, or with the last two dimensions swapped in memory."""
        if self.chance(0.2):
            return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).mT
        return torch.randn(shape).to(dtype)

    def problem(self, name: str, leaves: list[Tensor], ours: Run, *theirs: Run) -> Problem:
        """A third of them with gradients of the leaves."""
        named = f"{name} {str(leaves[0].dtype).removeprefix('torch.')}{'' if leaves[0].is_contiguous() else ' strided'}"
        if leaves[0].dtype != torch.float32 or self.chance(0.67):
            return Problem(named, ours, theirs)
        for leaf in leaves:
            leaf.requires_grad_()
        ours, *theirs = (_with_gradients(run, leaves) for run in (ours, *theirs))
        return Problem(f"{named}, gradients", ours, tuple(theirs))


def _with_gradients(run: Run, leaves: list[Tensor]) -> Run:
    def step() -> None:
        out = run()
        total = sum(each.sum() for each in out) if isinstance(out, tuple) else out.sum()
        torch.autograd.grad(total, leaves)

    return step


def draw_ms_deform_attn(draw: Draw) -> Problem:
    B, H, D, L, P = draw.size(1, 3), draw.size(1, 8), draw.size(4, 64), draw.size(1, 4), draw.size(1, 8)
    shapes = [(draw.size(1, 60), draw.size(1, 100)) for _ in range(L)]
    Q, dtype = draw.size(1, 4000), draw.dtype()
    value = torch.randn(B, sum(h * w for h, w in shapes), H, D).to(dtype)
    locations, weights = torch.rand(B, Q, H, L, P, 2).to(dtype), torch.rand(B, Q, H, L, P).to(dtype)
    return draw.problem(
        f"value {tuple(value.shape)}, levels {shapes}, {Q} queries, {P} points", [value, locations, weights],
        lambda: ops.ms_deform_attn(value, shapes, locations, weights), lambda: reference_attention(value, shapes, locations, weights),
    )  # fmt: skip


def draw_kmeans_attn(draw: Draw) -> Problem:
    B, N, C, D, M, dtype = draw.size(1, 3), draw.size(1, 256), draw.size(4, 256), draw.size(4, 256), draw.size(1, 15000), draw.dtype()
    pixel, clusters, value = draw.tensor(dtype, B, C, M), torch.randn(B, N, C).to(dtype), draw.tensor(dtype, B, D, M)
    scale, bias = torch.ones(1), torch.zeros(1)
    return draw.problem(
        f"pixel {tuple(pixel.shape)}, {N} clusters, value {D}", [value],
        lambda: ops.kmeans_attn(pixel, clusters, value).update,
        lambda: reference_kmeans(pixel, clusters, value, scale, bias, False)[0],
        lambda: published_kmeans(pixel.float(), clusters.float(), value.float()),
    )  # fmt: skip


def draw_mask_pool(draw: Draw) -> Problem:
    B, N, C, M, dtype = draw.size(1, 3), draw.size(1, 170), draw.size(1, 256), draw.size(1, 15000), draw.dtype()
    masks, features = torch.randn(B, N, M).to(dtype) + draw.random.uniform(-3, 1), draw.tensor(dtype, B, C, M)
    return draw.problem(
        f"masks {tuple(masks.shape)} {(masks > 0).float().mean():.0%} on, {C} channels", [features],
        lambda: ops.mask_pool(masks, features), lambda: reference_pool(masks, features),
    )  # fmt: skip


def draw_kernel_updator(draw: Draw) -> Problem:
    N, C = draw.size(1, 500), draw.size(4, 256)
    updator, (pooled, kernels) = ops.KernelUpdator(C), torch.randn(2, N, C)
    parameters = [p for name in (*_LINEARS, *_NORMS) for p in (getattr(updator, name).weight, getattr(updator, name).bias)]
    updator.requires_grad_(False)
    return draw.problem(
        f"{N} kernels of {C} channels", [pooled, kernels], lambda: updator(pooled, kernels), lambda: reference_update(pooled, kernels, parameters)
    )


def draw_mask_iou(draw: Draw) -> Problem:
    N, M, P = draw.size(1, 200), draw.size(1, 200), draw.size(1, 100_000)
    a, b = torch.rand(N, P) < 0.2, torch.rand(M, P) < 0.2
    return Problem(f"{N} x {M} masks of {P}", lambda: ops.mask_iou(a, b), (lambda: matmul(a, b),))


def draw_mask_cost(draw: Draw) -> Problem:
    N, M, P, dtype = draw.size(1, 200), draw.size(1, 50), draw.size(1, 50_000), draw.dtype()
    logits, targets = draw.tensor(dtype, N, P), torch.rand(M, P) < 0.2
    return draw.problem(
        f"{N} x {M} of {P}", [logits], lambda: tuple(ops.mask_costs(logits, targets)), lambda: tuple(reference_costs(logits, targets))
    )


def draw_point_sample(draw: Draw) -> Problem:
    N, T, H, W, K, dtype = draw.size(1, 100), draw.size(1, 4), draw.size(1, 120), draw.size(1, 216), draw.size(1, 20_000), draw.dtype()
    masks = draw.tensor(dtype, N, T, H, W)
    points = torch.rand(N, K, 2) if draw.chance(0.5) else torch.rand(K, 2)
    return draw.problem(
        f"masks {tuple(masks.shape)} at {tuple(points.shape[:-1])} points", [masks],
        lambda: ops.point_sample(masks, points), lambda: reference_sample(masks, points),
    )  # fmt: skip


def draw_memory_match(draw: Draw) -> Problem:
    N, M, C, dtype = draw.size(1, 300), draw.size(1, 500), draw.size(4, 512), draw.dtype()
    embeddings, memory = draw.tensor(dtype, N, C), draw.tensor(dtype, M, C)
    labels = (torch.randint(0, 40, (N,)), torch.randint(0, 40, (M,))) if draw.chance(0.5) else (None, None)
    return draw.problem(
        f"{N} x {M} of {C} channels{', labels' * (labels[0] is not None)}", [embeddings, memory],
        lambda: ops.memory_match(embeddings, memory, labels=labels[0], memory_labels=labels[1]),
        lambda: reference_match(embeddings, memory, "bisoftmax", *labels),
    )  # fmt: skip


def draw_memory_read(draw: Draw) -> Problem:
    B, O, N, M = draw.size(1, 2), draw.size(1, 4), draw.size(1, 8000), draw.size(1, 1600)
    CK, CV, k, dtype = draw.size(4, 128), draw.size(4, 512), draw.size(1, 60), draw.dtype()
    key, value, query = draw.tensor(dtype, B, N, CK), draw.tensor(dtype, B, O, N, CV), draw.tensor(dtype, B, M, CK)
    kept = k if k < N else None
    return draw.problem(
        f"memory {tuple(value.shape)}, {M} queries, keys of {CK}, top {k}", [key, value, query],
        lambda: ops.memory_read(key, value, query, k), lambda: reference_read(key, value, query, kept)[0],
    )  # fmt: skip


DRAWS = {name.removeprefix("draw_"): draw for name, draw in list(globals().items()) if name.startswith("draw_")}


def seconds(runs: tuple[Run, ...], budget: float) -> list[float]:
    """The least time of a call of each, in turn with the others; so many calls at a time that the clock does not matter."""
    for run in runs:
        run()
    calls, least = [], [math.inf] * len(runs)
    for run in runs:
        start = time.perf_counter()
        run()
        calls.append(min(100, 1 + int(2e-4 / (time.perf_counter() - start))))
    end, rounds = time.perf_counter() + budget, 0
    while rounds < 3 or time.perf_counter() < end:
        rounds += 1
        for i, run in enumerate(runs):
            start = time.perf_counter()
            for _ in range(calls[i]):
                run()
            least[i] = min(least[i], (time.perf_counter() - start) / calls[i])
    return least


def speed(problem: Problem, budget: float) -> tuple[float, float, float]:
    """(ours, quickest of theirs, least ratio that counts as level)"""
    ours, *theirs = seconds((problem.ours, *problem.theirs), budget)
    return ours, min(theirs), LEVEL_SHORT if min(theirs) < SHORT else LEVEL


def sweep(op: str, shapes: int, seed: int, budget: float, worst: int) -> bool:
    """Prints how one op does; whether it never loses."""
    draw, ratios, losses = Draw(seed), [], []
    for _ in range(shapes):
        problem = DRAWS[op](draw)
        for times in (1, 10):
            ours, theirs, level = speed(problem, times * budget)
            if theirs >= level * ours:
                break
        else:
            losses.append((theirs / ours, f"{theirs / ours:.2f}x, {ours * 1e6:.0f} us for {theirs * 1e6:.0f} us: {problem.name}"))
        ratios.append(theirs / ours)
    ratios.sort()
    quantiles = ", ".join(f"{ratios[round(q * (shapes - 1))]:.2f}x" for q in (0, 0.1, 0.5, 0.9))
    print(f"{op}: {len(losses)} of {shapes} slower than PyTorch; speed at least, 10 %, median, 90 %: {quantiles}", flush=True)
    for _, line in sorted(losses)[:worst]:
        print(f"  {line}", flush=True)
    return not losses


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description="Looks for sizes at which an op is slower than plain PyTorch.")
    parser.add_argument("names", nargs="*", metavar="op", choices=[[], *DRAWS], help=f"all by default: {', '.join(DRAWS)}")
    parser.add_argument("--shapes", type=int, default=100, help="random problems per op")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds of timing per problem, ten times as many where it seems to lose")
    parser.add_argument("--worst", type=int, default=10, help="losses to print")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"level is {LEVEL:g}x of PyTorch's speed, {LEVEL_SHORT:g}x below {SHORT * 1e6:g} us a call, where timings scatter")
    return 0 if all([sweep(op, args.shapes, args.seed, args.budget, args.worst) for op in args.names or DRAWS]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
