# SPDX-License-Identifier: Apache-2.0
"""The memory read on CUDA and Triton: real ones on a GPU, elsewhere emulated and interpreted."""

import pytest
import torch
from torch import Tensor

from pyvseg.ops import _dispatch, memory_read
from pyvseg.ops.memory_read import similarity
from tests.ops.implementations import Implementation, assert_replays, implementations
from tests.ops.numerics import assert_as_exact

on_gpus = pytest.mark.parametrize(
    "implementation", [each for each in implementations("memory_read") if each.values[0].isa is None], indirect=True
)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = [  # B, N, M, O, CK, CV, top_k, dtype: groups of eight positions matter where they are more than top_k
    (1, 140, 12, 2, 64, 64, 20, F32),
    (1, 141, 12, 2, 72, 64, 6, BF16),
    (1, 140, 12, 1, 64, 16, 4, F16),
    (2, 97, 3, 3, 33, 7, 5, F32),
    (2, 44, 3, 2, 33, 7, 3, BF16),
    (1, 20, 3, 1, 16, 40, 20, F32),
    (1, 1, 1, 1, 1, 1, 1, F32),
    (1, 150, 2, 1, 40, 24, 130, F16),
]


def inputs(B: int, N: int, M: int, O: int, CK: int, CV: int, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, N, CK).to(dtype), torch.randn(B, O, N, CV).to(dtype), torch.randn(B, M, CK).to(dtype)


def kept(implementation: Implementation, key: Tensor, value: Tensor, query: Tensor, top_k: int) -> Tensor:
    """(B, M, top_k) positions that the kernel keeps."""
    return _dispatch.kernels(implementation.backend).memory_read(*implementation.place(key, value, query), top_k)[1].long().cpu()


def read_of(key: Tensor, value: Tensor, query: Tensor, index: Tensor, dot: bool = False) -> Tensor:
    """The read with a given selection, in the dtype of the inputs (at least float32 inside)."""
    wide = torch.promote_types(key.dtype, torch.float32)
    S = query.to(wide) @ key.to(wide).mT if dot else similarity(key, query)
    rows = torch.stack([v[:, i] for v, i in zip(value, index, strict=True)]).to(wide)
    return torch.einsum("bmk,bomkc->bomc", S.gather(-1, index).softmax(-1), rows).to(value.dtype)


@on_gpus
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(implementation, case):
    *sizes, k, dtype = case
    args = inputs(*sizes, dtype)
    exact = [t.double() for t in args]
    out_grad = torch.randn(sizes[0], sizes[3], sizes[2], sizes[5]).to(dtype)

    def run(function, tensors) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out, *others = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, out_grad.to(out)), *others]

    *ours, index, _ = run(lambda *t: _dispatch.kernels(implementation.backend).memory_read(*t, k), implementation.place(*args))
    index = index.long().cpu()
    S = similarity(exact[0], exact[2])
    best, chosen = S.topk(k).values, S.gather(-1, index).sort(-1, descending=True).values
    assert (index.diff(dim=-1) > 0).all(), "positions are ascending"
    assert (best - chosen).abs().max() <= 1e-5 * S.abs().max()
    same, expected = (run(lambda *t: [read_of(*t, index)], tensors) for tensors in (args, exact))
    for what, mine, *two in zip(("readout", "memory_key", "memory_value", "query_key"), ours, same, expected, strict=True):
        assert_as_exact(mine.cpu(), *two, what=what)


@on_gpus
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_tiles_and_chunks_of_queries(implementation, dtype, monkeypatch):
    if implementation.backend == "triton":
        monkeypatch.setattr("pyvseg.kernels.memory_read._BUFFER_WORDS", 800)  # 66 queries a chunk
    for N in (17,) if implementation.backend == "triton" else (17, 601):  # the last group holds one position
        args = inputs(1, N, 70 if dtype == F32 else 5, 1, 8, 1, dtype)
        exact = similarity(args[0].double(), args[2].double())
        assert torch.equal(kept(implementation, *args, 1), exact.argmax(-1, keepdim=True))


@on_gpus
def test_dot_form(implementation):
    """Shrinkage and selection: the similarity is a plain product of wider keys."""
    args = inputs(1, 90, 4, 2, 24, 16)
    leaves = [t.requires_grad_() for t in implementation.place(*args)]
    out, index, _ = _dispatch.kernels(implementation.backend).memory_read(*leaves, 9, True)
    mine = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in args]
        out = read_of(*leaves, index.long().cpu(), dot=True)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for one, *two in zip(mine, *results, strict=True):
        assert_as_exact(one.cpu(), *two)


@on_gpus
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_equal_scores_keep_the_earlier_position(implementation, dtype):
    base = torch.randn(1, 40, 16).to(dtype)
    query = torch.randn(1, 3, 16).to(dtype)
    order = (similarity(base.double(), query.double()).argsort(-1, descending=True)[..., None] + torch.tensor([0, 40, 80])).flatten(-2)
    for k in (2, 5, 50):
        index = kept(implementation, base.repeat(1, 3, 1), torch.zeros(1, 1, 120, 1).to(dtype), query, k)
        assert torch.equal(index, order[..., :k].sort(-1).values)


@on_gpus
@pytest.mark.parametrize("where", ["memory_key", "memory_value", "query_key"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_propagate_as_in_the_reference(implementation, where, bad):
    args = dict(zip(("memory_key", "memory_value", "query_key"), inputs(1, 60, 4, 1, 16, 8), strict=True))
    args[where].flatten()[::67] = bad
    expected = memory_read(**args, top_k=8, backend="reference")
    leaves = dict(zip(args, (t.requires_grad_() for t in implementation.place(*args.values())), strict=True))
    out = memory_read(**leaves, top_k=8, backend=implementation.backend)
    torch.testing.assert_close(out.cpu(), expected, equal_nan=True, rtol=1e-4, atol=1e-5)
    torch.autograd.grad(out.sum(), tuple(leaves.values()))  # must come back, whatever the values


@on_gpus
def test_strides_and_alignment_change_nothing(implementation):
    bank = torch.randn(2, 300, 48), torch.randn(2, 5, 300, 40), torch.randn(2, 48, 77)
    args = bank[0][:, 10:60:2, 1:17], bank[1][:, 1:3, 10:60:2, 3:27], bank[2][:, :16, :4].transpose(1, 2)

    def run(tensors) -> list[Tensor]:
        leaves = [t.requires_grad_() for t in tensors]
        out = memory_read(*leaves, top_k=9, backend=implementation.backend)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    plain = run(implementation.place(*(t.contiguous() for t in args)))
    for mine, theirs in zip(run([t.to(implementation.device).detach() for t in args]), plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@on_gpus
def test_gradient_is_deterministic(implementation):
    """Every query reads the same few positions: many readers each."""
    key, value, query = implementation.place(*inputs(1, 6, 20, 1, 8, 8))

    def run() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (key, value, query)]
        return torch.autograd.grad(memory_read(*leaves, top_k=4, backend=implementation.backend).square().sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@on_gpus
def test_foreign_indices_are_skipped(implementation):
    """Positions outside the memory, which no forward makes, must not be followed."""
    key, value, query = inputs(1, 9, 4, 1, 8, 8)
    index = torch.tensor([0, 3, 9, -1, 2**31 - 1]).int().expand(1, 4, 5)
    args = implementation.place(torch.randn(1, 1, 4, 8), key, value, query, index, torch.full((1, 4, 5), 0.2))
    backward = _dispatch.kernels(implementation.backend).memory_read_backward
    for grad in backward(*args):
        assert grad.isfinite().all()


@on_gpus
def test_opcheck(implementation):
    op = _dispatch.kernels(implementation.backend).memory_read.default
    torch.library.opcheck(op, (*(t.requires_grad_() for t in implementation.place(*inputs(1, 20, 3, 2, 8, 8))), 5))


@on_gpus
def test_compile(implementation):
    args = implementation.place(*inputs(1, 30, 3, 2, 16, 8))
    read = lambda *t: memory_read(*t, top_k=7, backend=implementation.backend) * 2  # noqa: E731
    torch.testing.assert_close(torch.compile(read, fullgraph=True)(*args), read(*args))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_graph_capture(backend):
    """No host synchronisation, forward or backward."""
    leaves = [t.cuda().requires_grad_() for t in inputs(1, 8100, 1620, 3, 64, 512, torch.bfloat16)]

    def run() -> list[Tensor]:
        out = memory_read(*leaves, top_k=50, backend=backend)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    assert_replays(run)
