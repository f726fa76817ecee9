# SPDX-License-Identifier: Apache-2.0
"""The memory read at 480p: a 30 x 54 grid, three objects, one query frame.

The share of the roofline may pass 100 %: it is against a float32 matrix product, while on AVX-512 BF16 machines most of
the exact float32 search runs on bfloat16 pairs with an error bound.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case
from pyvseg.ops import memory_read
from pyvseg.ops.memory_read import reference

M, CK, CV, O = 30 * 54, 64, 512, 3


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


def with_backward(function, leaves: list[Tensor]):
    def run():
        for leaf in leaves:
            leaf.grad = None
        outs = function()
        torch.autograd.backward([out.sum() for out in (outs if isinstance(outs, list) else [outs])])

    return run


def case(frames: int, k: int, dtype: torch.dtype, backward: bool, quick: bool, bar: float | None) -> Case:
    N = frames * M
    key, query, value = (t.to(dtype) for t in (torch.randn(1, N, CK), torch.randn(1, M, CK), torch.randn(1, O, N, CV)))
    first = [t[0].T.float().contiguous() for t in (key, query)]
    values = [v.T.float().contiguous() for v in value[0]]
    table = value[0].float().permute(1, 0, 2).reshape(N, O * CV)
    if backward:
        for t in (key, query, value, *first, *values, table):
            t.requires_grad_()
    ways = {
        "published, per object": lambda: published(first[0], values, first[1], k),
        "pyvseg": lambda: memory_read(key, value, query, k),
    }
    if not backward:
        ways["shared affinity, embedding_bag"] = lambda: shared_eager(key[0].float(), table, query[0].float(), k)
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
    name = f"{frames} memory frames, k={k}, {str(dtype).removeprefix('torch.')}{', forward and backward' if backward else ''}"
    bars = {("pyvseg", "published, per object"): bar} if bar else {}
    return Case("memory_read", name, ways, traffic, flops, dtype, bars)


def cases(quick: bool) -> Iterator[Case]:
    for frames, bar in ((5, 11), (20, 22)):
        for k in (50,) if quick else (20, 50):
            yield case(frames, k, torch.float32, False, quick, bar)
    if not quick:
        yield case(5, 20, torch.bfloat16, False, True, None)
    yield case(5, 20, torch.float32, True, quick, None)
