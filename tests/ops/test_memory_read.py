# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyvseg.ops import memory_read
from pyvseg.ops.memory_read import reference, similarity
from tests.conftest import shared
from tests.ops.numerics import assert_as_exact

pytestmark = pytest.mark.filterwarnings("error::UserWarning:pyvseg")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # B, N, M, O, CK, CV, top_k
    (1, 500, 130, 2, 64, 512, 20),
    (2, 97, 65, 3, 33, 70, 7),
    (1, 20, 20, 1, 16, 40, 20),
    (1, 1, 1, 1, 1, 1, 1),
    (3, 7, 3, 1, 5, 17, 2),
    (1, 1200, 64, 1, 128, 256, 50),
]


def inputs(B: int, N: int, M: int, O: int, CK: int, CV: int, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, N, CK).to(dtype), torch.randn(B, O, N, CV).to(dtype), torch.randn(B, M, CK).to(dtype)


def kept(key: Tensor, value: Tensor, query: Tensor, top_k: int) -> Tensor:
    """(B, M, top_k) positions that the compiled kernel keeps."""
    return torch.ops.pyvseg.memory_read(key, value, query, top_k)[1].long()


def read_of(key: Tensor, value: Tensor, query: Tensor, index: Tensor) -> Tensor:
    """The read with a given selection, in the dtype of the inputs (at least float32 inside)."""
    weight = similarity(key, query).gather(-1, index).softmax(-1)
    rows = torch.stack([v[:, i] for v, i in zip(value, index)]).to(weight.dtype)
    return torch.einsum("bmk,bomkc->bomc", weight, rows).to(value.dtype)


def assert_selects(S: Tensor, index: Tensor, margin: float) -> None:
    """Every selection is the float64 top-k, but for pairs closer than the margin and rarely."""
    k = index.shape[-1]
    assert (index.sort(-1).values.diff(dim=-1) > 0).all(), "a position was kept twice"
    exact = S.topk(k).values
    chosen = S.gather(-1, index).sort(-1, descending=True).values
    assert (exact - chosen).abs().max() <= margin
    assert (exact != chosen).any(-1).double().mean() <= 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(isa, shape, dtype):
    *sizes, k = shape
    args = inputs(*sizes, dtype)
    exact = [t.double() for t in args]
    index = kept(*args, k)
    S = similarity(exact[0], exact[2])
    assert_selects(S, index, margin=1e-5 * S.abs().max().item())
    assert_as_exact(memory_read(*args, top_k=k), read_of(*args, index), read_of(*exact, index))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_the_definition(dtype):
    args = inputs(2, 90, 31, 2, 16, 24, dtype)
    key, value, query = (t.double() for t in args)
    S = (2 * torch.einsum("bnc,bmc->bnm", key, query) - key.square().sum(-1)[..., None]) / 4
    best, index = S.topk(6, dim=1)
    weight = torch.zeros_like(S).scatter(1, index, best.softmax(1))
    exact = torch.einsum("bonc,bnm->bomc", value, weight)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (reference(*args, 6)[0].double() - exact).abs().max() < tolerance
    assert (reference(key, value, query, 6)[0] - exact).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] < 600])
def test_gradients(isa, shape, dtype):
    *sizes, k = shape
    args = inputs(*sizes, dtype)
    index = kept(*args, k)
    out_grad = torch.randn(sizes[0], sizes[3], sizes[2], sizes[5]).to(dtype)

    def gradients(function, tensors):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*leaves), leaves, out_grad.to(tensors[0].dtype))

    ours = gradients(lambda *t: memory_read(*t, top_k=k), args)
    same = gradients(lambda *t: read_of(*t, index), args)
    exact = gradients(lambda *t: read_of(*t, index), [t.double() for t in args])
    for name, *three in zip(("memory_key", "memory_value", "query_key"), ours, same, exact):
        assert_as_exact(*three, what=f"gradient of {name}")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    B, N, M, O, CK, CV = (draw(*r) for r in ((1, 3), (1, 200), (1, 150), (1, 4), (1, 70), (1, 140)))
    k, dtype = draw(1, N), data.draw(st.sampled_from(DTYPES))
    args = inputs(B, N, M, O, CK, CV, dtype)
    index = kept(*args, k)
    exact = [t.double() for t in args]
    S = similarity(exact[0], exact[2])
    assert_selects(S, index, margin=1e-5 * S.abs().max().item())
    assert_as_exact(memory_read(*args, top_k=k), read_of(*args, index), read_of(*exact, index))


@pytest.mark.parametrize("scale, query_scale", [(1e-20, 1e-20), (1e-3, 1e-3), (30.0, 30.0), (1e4, 1e4), (1e3, 1e-3), (1e-3, 1e3)])
def test_selection_is_exact_at_any_scale(isa, scale, query_scale):
    """bfloat16 pre-selection must never lose a position: float32 scores of clustered keys decide far below its precision."""
    base = torch.randn(1, 1, 64)
    key = (base + 1e-3 * torch.randn(1, 3000, 64)) * scale
    query = (base + 1e-3 * torch.randn(1, 64, 64)) * query_scale
    index = kept(key, torch.zeros(1, 1, 3000, 1), query, 20)
    S = similarity(key.double(), query.double())
    exact, chosen = S.topk(20).values, S.gather(-1, index).sort(-1, descending=True).values
    # float32 rounding of a sum of 64 products of this size
    assert (exact - chosen).abs().max() <= 64 * 2.0**-24 * S.abs().max().item() + 1e-37


def test_selection_in_half_precision_is_exact(isa):
    """float16 has more digits than the bfloat16 of the pre-selection."""
    key, query = (1 + 1e-2 * torch.randn(1, n, 64).half() for n in (3000, 64))
    S = similarity(key.double(), query.double())
    chosen = S.gather(-1, kept(key, torch.zeros(1, 1, 3000, 1), query, 20)).sort(-1, descending=True).values
    assert (S.topk(20).values - chosen).abs().max() <= 64 * 2.0**-24 * S.abs().max().item()


def test_equal_scores_keep_the_earlier_position(isa):
    key = torch.randn(1, 40, 16).repeat(1, 3, 1)  # each position three times
    query = torch.randn(1, 70, 16)
    value = torch.randn(1, 1, 120, 8)
    for k in (1, 2, 4, 5, 50):
        order = (similarity(key[:, :40].double(), query.double()).argsort(-1, descending=True)[..., None] + torch.tensor([0, 40, 80])).flatten(-2)
        assert torch.equal(kept(key, value, query, k), order[..., :k].sort(-1).values)
        assert torch.equal(_reference_index(key, query, k), order[..., :k].sort(-1).values)


def _reference_index(key: Tensor, query: Tensor, k: int) -> Tensor:
    """Positions that the reference reads: with one-hot values its result is the weights."""
    N = key.shape[1]
    weights = memory_read(key, torch.eye(N).expand(1, 1, N, N), query, k, backend="reference")[:, 0]
    return weights.nonzero()[:, -1].view(1, query.shape[1], k)


def test_sorted_memory(isa):
    """Scores that rise along the memory pass every threshold; scores that fall pass none."""
    key = torch.linspace(-1, 1, 3000).view(1, -1, 1)
    value = torch.arange(3000.0).view(1, 1, -1, 1)
    for keys in (key, key.flip(1)):
        index = kept(keys, value, torch.full((1, 3, 1), 1.0), 10)
        assert torch.equal(keys[0, index[0, 0], 0].sort().values, key[0, -10:, 0])


def test_strided_inputs_are_read_in_place(isa):
    bank = torch.randn(2, 300, 48), torch.randn(2, 5, 300, 40), torch.randn(2, 48, 77)
    args = bank[0][:, 10:200:2, :16], bank[1][:, 1:4, 10:200:2, 3:30], bank[2][:, :16].transpose(1, 2)
    plain = memory_read(*(t.contiguous() for t in args), top_k=9)
    assert torch.equal(memory_read(*args, top_k=9), plain)
    leaves = [t.detach().requires_grad_() for t in args]
    grads = torch.autograd.grad(memory_read(*leaves, top_k=9).square().sum(), leaves)
    leaves = [t.detach().contiguous().requires_grad_() for t in args]
    for mine, theirs in zip(grads, torch.autograd.grad(memory_read(*leaves, top_k=9).square().sum(), leaves)):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("where", ["memory_key", "memory_value", "query_key"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_propagate_as_in_the_reference(isa, where, bad):
    args = dict(zip(("memory_key", "memory_value", "query_key"), inputs(1, 120, 70, 2, 16, 24)))
    args[where].flatten()[::397] = bad
    mine, theirs = memory_read(**args, top_k=8), memory_read(**args, top_k=8, backend="reference")
    torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)
    leaves = [t.requires_grad_() for t in args.values()]
    torch.autograd.grad(memory_read(*leaves, top_k=8).sum(), leaves)  # must come back, whatever the values


def test_all_nan_memory(isa):
    out = memory_read(torch.full((1, 500, 8), float("nan")), torch.ones(1, 1, 500, 4), torch.ones(1, 3, 8), 5)
    assert out.isnan().all()


def test_gradient_is_deterministic():
    leaves = [t.requires_grad_() for t in inputs(1, 200, 900, 2, 32, 48)]

    def run(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        out = memory_read(*leaves, top_k=20)
        result = [out, *torch.autograd.grad(out.square().sum(), leaves)]
        torch.set_num_threads(before)
        return result

    first = run(2)
    for again in (run(2), run(1), run(3)):
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_full_softmax_is_the_limit_of_top_k():
    args = inputs(2, 50, 21, 2, 16, 24)
    exact = memory_read(*(t.double() for t in args), top_k=50)
    assert (memory_read(*args, top_k=None).double() - exact).abs().max() < 1e-5
    assert (memory_read(*args, top_k=10**9).double() - exact).abs().max() < 1e-5


def test_full_softmax_in_chunks(monkeypatch):
    leaves = [t.requires_grad_() for t in inputs(1, 50, 33, 2, 16, 24)]

    def run() -> list[Tensor]:
        out = memory_read(*leaves, top_k=None)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    whole = run()
    monkeypatch.setitem(memory_read.__globals__, "_AFFINITY_FLOATS", 500)
    for a, b in zip(run(), whole):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("empty", ["B", "N", "M", "O", "CV"])
@pytest.mark.parametrize("top_k", [5, None])
def test_empty_inputs(empty, top_k):
    sizes = dict(B=2, N=9, M=4, O=3, CK=8, CV=6) | {empty: 0}
    leaves = [t.requires_grad_() for t in inputs(**sizes)]
    out = memory_read(*leaves, top_k=top_k)
    assert out.shape == (sizes["B"], sizes["O"], sizes["M"], sizes["CV"])
    assert (out == 0).all()
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert grad.shape == leaf.shape and (grad == 0).all()


def test_opcheck():
    args = [t.requires_grad_() for t in inputs(2, 30, 21, 2, 8, 12)]
    torch.library.opcheck(torch.ops.pyvseg.memory_read.default, (*args, 5))
    with torch.no_grad():
        _, index, weight = torch.ops.pyvseg.memory_read(*args, 5)
        grad = torch.randn(2, 2, 21, 12)
        torch.library.opcheck(torch.ops.pyvseg.memory_read_backward.default, (grad, *[a.detach() for a in args], index, weight))


def test_compile_and_export():
    args = inputs(1, 60, 30, 2, 16, 24)
    eager = memory_read(*args, top_k=7)
    compiled = torch.compile(lambda *t: memory_read(*t, top_k=7) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(*args), eager * 2)

    class Read(torch.nn.Module):
        def forward(self, key: Tensor, value: Tensor, query: Tensor) -> Tensor:
            return memory_read(key, value, query, 7)

    assert torch.equal(torch.export.export(Read(), args).module()(*args), eager)


BAD = {
    "memory_key must have 3 dimensions": (ValueError, dict(memory_key=torch.zeros(9, 8))),
    "memory_value must have 4 dimensions": (ValueError, dict(memory_value=torch.zeros(1, 9, 6))),
    r"memory_value must be \(B=1, O, N=9, CV\)": (ValueError, dict(memory_value=torch.zeros(1, 2, 8, 6))),
    r"query_key must be \(B=1, M, CK=8\)": (ValueError, dict(query_key=torch.zeros(1, 4, 7))),
    "query_key must have memory_key's dtype": (TypeError, dict(query_key=torch.zeros(1, 4, 8, dtype=torch.bfloat16))),
    "memory_key must be float32, bfloat16 or float16": (TypeError, dict(memory_key=torch.zeros(1, 9, 8, dtype=torch.int32))),
    "memory_value must be a tensor": (TypeError, dict(memory_value=[1])),
    "top_k must be a positive integer or None, got 0": (ValueError, dict(top_k=0)),
    "top_k must be a positive integer or None, got 2.5": (ValueError, dict(top_k=2.5)),
    "query_key is on meta": (ValueError, dict(query_key=torch.zeros(1, 4, 8, device="meta"))),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments(message):
    error, change = BAD[message]
    args = dict(memory_key=torch.zeros(1, 9, 8), memory_value=torch.zeros(1, 2, 9, 6), query_key=torch.zeros(1, 4, 8))
    with pytest.raises(error, match=message):
        memory_read(**(args | change))


def test_other_floating_dtypes_take_the_reference():
    args = inputs(1, 30, 10, 1, 8, 6)
    exact = memory_read(*(t.double() for t in args), top_k=4)
    assert exact.dtype == torch.float64
    with pytest.raises(TypeError, match="backend='cpu'"):
        memory_read(*(t.double() for t in args), top_k=4, backend="cpu")


def test_direct_calls_of_the_op_are_checked():
    key, value, query = inputs(1, 9, 4, 1, 8, 6)
    for args in ((key, value[:, :, :5], query, 3), (key, value, query[..., :4], 3), (key, value, query, 10), (key, value, query, 0)):
        with pytest.raises(RuntimeError):
            torch.ops.pyvseg.memory_read(*args)
    _, index, weight = torch.ops.pyvseg.memory_read(key, value, query, 3)
    with pytest.raises(RuntimeError, match="out of range"):
        torch.ops.pyvseg.memory_read_backward(torch.zeros(1, 1, 4, 6), key, value, query, index + 9, weight)


def test_memory_stays_bounded():
    """The affinity of this read would be 820 MB."""
    code = """
import resource, torch
from pyvseg.ops import memory_read
key, value, query = torch.randn(1, 100_000, 16), torch.randn(1, 1, 100_000, 4), torch.randn(1, 2048, 16)
memory_read(key[:, :100], value[:, :, :100], query)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
memory_read(key, value, query)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64


@pytest.mark.parametrize("tag", "abcdef")
def test_published_results(isa, tag):
    folder = shared("parity", "ops-memory_read")
    config = json.loads((folder / "manifest.json").read_text())["config"][tag]
    with np.load(folder / "tensors.npz") as stored:
        load = lambda kind, name: torch.from_numpy(stored[f"{kind}/{tag}/{name}"]).float()  # noqa: E731
        key, value, query, out_grad = (load("in", n).flatten(2).mT for n in ("mk", "mv", "qk", "grad_out"))
        leaves = [t.detach().requires_grad_() for t in (key, value.unsqueeze(0), query)]
        for form, top_k in (("topk", config["top_k"]), ("full", None)):
            out = memory_read(*leaves, top_k=top_k)
            readout = load("out", "readout" if form == "topk" else "full_readout").flatten(2).mT
            torch.testing.assert_close(out[0], readout, rtol=1e-4, atol=3e-4)
            mk, mv, qk = torch.autograd.grad(out, leaves, out_grad.unsqueeze(0))
            for name, grad in (("mk", mk.mT), ("qk", qk.mT), ("mv_sum", mv[0].sum(-1)), ("mv_c0", mv[0, ..., 0])):
                expected = load("out", f"{form}_grad_{name}")
                torch.testing.assert_close(grad.reshape(expected.shape), expected, rtol=1e-4, atol=3e-4)
