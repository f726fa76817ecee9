# SPDX-License-Identifier: Apache-2.0
"""The memory read at 480p (a 30 x 54 grid), three objects, one query frame or the five of a clip; on a GPU at 720p and 1080p too.

The share of the roofline may pass 100 %: it is against a float32 matrix product, while on AVX-512 BF16 machines most of
the exact float32 search runs on bfloat16 pairs with an error bound.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, on_gpu
from pyvseg.ops import memory_read
from pyvseg.ops.memory_read import reference

M, CK, CV, O = 30 * 54, 64, 512, 3
GPU_BAR = 5.0  # times eager PyTorch


def published(key: Tensor, values: list[Tensor], query: Tensor, k: int) -> list[Tensor]:
    """As STCN and PCVOS read: channels first, for each object its own affinity, top-k over the strided axis, a dense
    weight matrix and a matrix product with it. key (CK, N), value (CV, N), query (CK, M)."""
    readouts = []
    for value in values:
        S = (2 * key.T @ query - key.square().sum(0).unsqueeze(1)) / math.sqrt(CK)
        best, index = S.topk(k, dim=0)
        weight = torch.zeros_like(S).scatter(0, index, best.softmax(0))
        readouts.append(value @ weight)
    return readouts


def shared_eager(key: Tensor, table: Tensor, query: Tensor, k: int) -> Tensor:
    """The best that PyTorch has: one affinity, top-k over rows, an embedding bag over (N, O CV)."""
    S = torch.addmm(key.square().sum(1), query, key.T, beta=-1, alpha=2) / math.sqrt(CK)
    best, index = S.topk(k, dim=1)
    return F.embedding_bag(index, table, per_sample_weights=best.softmax(1), mode="sum")


def published_anisotropic(
    key: Tensor, shrinkage: Tensor, values: list[Tensor], query: Tensor, selection: Tensor, k: int
) -> tuple[list[Tensor], Tensor]:
    """As XMem reads: channels first, shrinkage (N, 1), selection (CK, M); the affinity is shared, the weight matrix dense."""
    two = 2 * key.T @ (query * selection) - key.square().T @ selection
    S = (two - (selection * query.square()).sum(0)) * shrinkage / math.sqrt(CK)
    best, index = S.topk(k, dim=0)
    weight = torch.zeros_like(S).scatter(0, index, best.softmax(0))
    return [value @ weight for value in values], weight.sum(1)


def with_backward(function, leaves: list[Tensor]):
    def run():
        for leaf in leaves:
            leaf.grad = None
        outs = function()
        torch.autograd.backward([out.sum() for out in (outs if isinstance(outs, list) else [outs])])

    return run


def _published_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is slower than float32 in PyTorch's CPU kernels: there the published form gets its best."""
    return dtype if on_gpu() else torch.float32


def case(frames: int, k: int, dtype: torch.dtype, backward: bool, quick: bool, bar: float | None, grid: tuple[int, int] = (30, 54)) -> Case:
    M = grid[0] * grid[1]
    N, bar, like = frames * M, GPU_BAR if on_gpu() else bar, _published_dtype(dtype)
    key, query, value = (t.to(dtype) for t in (torch.randn(1, N, CK), torch.randn(1, M, CK), torch.randn(1, O, N, CV)))
    first = [t[0].T.to(like).contiguous() for t in (key, query)]
    values = [v.T.to(like).contiguous() for v in value[0]]
    table = value[0].to(like).permute(1, 0, 2).reshape(N, O * CV)
    if backward:
        for t in (key, query, value, *first, *values, table):
            t.requires_grad_()
    ways = {
        "published, per object": lambda: published(first[0], values, first[1], k),
        "pyvseg": lambda: memory_read(key, value, query, k),
    }
    if not backward:
        ways["shared affinity, embedding_bag"] = lambda: shared_eager(key[0].to(like), table, query[0].to(like), k)
        if not on_gpu():
            ways["pyvseg reference"] = lambda: reference(key, value, query, k)
        if not quick:
            compiled = torch.compile(published, dynamic=False)
            ways["published, torch.compile"] = lambda: compiled(first[0], values, first[1], k)
    else:
        leaves = {"published, per object": [*first, *values], "pyvseg": [key, query, value]}
        ways = {way: with_backward(run, leaves[way]) for way, run in ways.items()}
    size = key.element_size()
    traffic = size * (N * CK + M * CK + O * N * CV + O * M * CV)
    flops = 2.0 * N * M * CK + 2.0 * M * k * O * CV
    if backward:
        traffic, flops = 3 * traffic, flops + 2 * 2.0 * M * k * (O * CV + CK)
    size_name = "" if M == 30 * 54 else f"{grid[0]} x {grid[1]} grid, "
    name = f"{size_name}{frames} memory frames, k={k}, {str(dtype).removeprefix('torch.')}{', forward and backward' if backward else ''}"
    bars = {("pyvseg", "published, per object"): bar} if bar else {}
    peak = torch.float32 if dtype == torch.float16 and not on_gpu() else dtype  # CPUs multiply float16 as float32
    return Case("memory_read", name, ways, traffic, flops, peak, bars)


def anisotropic_case(frames: int, k: int, bar: float) -> Case:
    N = frames * M
    key, query, value = torch.randn(1, N, CK), torch.randn(1, M, CK), torch.randn(1, O, N, CV)
    shrinkage, selection = 1 + torch.randn(1, N).square(), torch.rand(1, M, CK)
    first = [t[0].T.contiguous() for t in (key, query, selection)]
    values = [v.T.contiguous() for v in value[0]]
    terms = dict(shrinkage=shrinkage, selection=selection, return_usage=True)
    ways = {
        "published": lambda: published_anisotropic(first[0], shrinkage[0, :, None], values, *first[1:], k),
        "pyvseg": lambda: memory_read(key, value, query, k, **terms),
    }
    traffic = 4 * (N * (CK + 1) + 2 * M * CK + O * N * CV + O * M * CV + N)
    flops = 2.0 * N * M * 2 * CK + 2.0 * M * k * O * CV
    name = f"{frames} memory frames, k={k}, shrinkage, selection and usage, float32"
    return Case("memory_read", name, ways, traffic, flops, torch.float32, {("pyvseg", "published"): GPU_BAR if on_gpu() else bar})


def clip_case(frames: int, k: int, dtype: torch.dtype, bar: float) -> Case:
    """Five query frames: one call must cost no more than five, and memory stays bounded."""
    N, clip, bar, like = frames * M, 5, GPU_BAR if on_gpu() else bar, _published_dtype(dtype)
    key, query, value = (t.to(dtype) for t in (torch.randn(1, N, CK), torch.randn(1, clip * M, CK), torch.randn(1, O, N, CV)))
    first, values = key[0].T.to(like).contiguous(), [v.T.to(like).contiguous() for v in value[0]]
    columns = [q.T.to(like).contiguous() for q in query[0].split(M)]
    ways = {
        "published, frame by frame": lambda: [published(first, values, q, k) for q in columns],
        "pyvseg": lambda: memory_read(key, value, query, k),
        "pyvseg, frame by frame": lambda: [memory_read(key, value, q, k) for q in query.split(M, dim=1)],
    }
    affordable = frames <= 5 or on_gpu()
    if not affordable:
        del ways["published, frame by frame"]  # ten seconds a run
    size = key.element_size()
    traffic = size * (N * CK + clip * M * CK + O * N * CV + O * clip * M * CV)
    flops = 2.0 * N * clip * M * CK + 2.0 * clip * M * k * O * CV
    name = f"{frames} memory frames, {clip} query frames, k={k}, {str(dtype).removeprefix('torch.')}"
    bars = {("pyvseg", "pyvseg, frame by frame"): 0.9}
    if affordable:
        bars[("pyvseg", "published, frame by frame")] = bar
    return Case("memory_read", name, ways, traffic, flops, dtype, bars)


def cases(quick: bool) -> Iterator[Case]:
    for frames, bar in ((5, 20), (20, 45)):
        for k in (50,) if quick else (20, 50):
            yield case(frames, k, torch.float32, False, quick, bar)
        if not quick:
            yield clip_case(frames, 50, torch.float32, bar)
    yield anisotropic_case(5, 30, 10)
    if not quick:
        yield case(5, 20, torch.bfloat16, False, True, None)
        yield case(5, 20, torch.float16, False, True, None)
    yield case(5, 20, torch.float32, True, quick, None)
    if on_gpu():
        yield from _gpu_cases()


def _gpu_cases() -> Iterator[Case]:
    """In half precision, and at 720p and 1080p."""
    for frames in (5, 10, 20):
        yield case(frames, 50, torch.bfloat16, False, True, None)
    yield clip_case(20, 50, torch.bfloat16, 0)
    for grid in ((45, 80), (68, 120)):
        yield case(5, 50, torch.bfloat16, False, True, None, grid)
    yield case(5, 50, torch.bfloat16, True, True, None)
