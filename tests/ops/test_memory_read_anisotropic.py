# SPDX-License-Identifier: Apache-2.0
"""The memory read with shrinkage and selection, and the usage of memory positions."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from pyvseg.ops import memory_read
from pyvseg.ops.memory_read import _expanded, similarity
from tests.conftest import shared
from tests.ops.numerics import assert_as_exact

TERMS = [("shrinkage", "selection"), ("shrinkage",), ("selection",)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(B: int, N: int, M: int, O: int, CK: int, CV: int, terms: tuple[str, ...], dtype=torch.float32) -> dict[str, Tensor]:
    args = dict(
        memory_key=torch.randn(B, N, CK), memory_value=torch.randn(B, O, N, CV), query_key=torch.randn(B, M, CK),
        shrinkage=1 + torch.randn(B, N).square(), selection=torch.rand(B, M, CK),
    )  # fmt: skip
    return {name: t.to(dtype) for name, t in args.items() if name in terms or name not in ("shrinkage", "selection")}


def distances(memory_key: Tensor, query_key: Tensor, shrinkage: Tensor | None = None, selection: Tensor | None = None) -> Tensor:
    """(B, M, N), as the definition reads: weighted squared distances."""
    e = torch.ones_like(query_key) if selection is None else selection
    S = -(e.unsqueeze(2) * (memory_key.unsqueeze(1) - query_key.unsqueeze(2)).square()).sum(-1) / memory_key.shape[-1] ** 0.5
    return S if shrinkage is None else S * shrinkage.unsqueeze(1)


def keys_of(args: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in args.items() if name != "memory_value"}


def kept(args: dict[str, Tensor], top_k: int) -> Tensor:
    """(B, M, top_k) positions that the compiled kernel keeps."""
    terms = [args.get(name) for name in ("shrinkage", "selection")]
    key, query = _expanded(args["memory_key"], args["query_key"], *terms)
    return torch.ops.pyvseg.memory_read(key, args["memory_value"], query, top_k, True)[1].long()


def read_of(args: dict[str, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    """Read and usage with a given selection of positions."""
    S = similarity(**keys_of(args))
    weight = S.gather(-1, index).softmax(-1)
    rows = torch.stack([v[:, i] for v, i in zip(args["memory_value"], index, strict=True)]).to(weight.dtype)
    read = torch.einsum("bmk,bomkc->bomc", weight, rows).to(args["memory_value"].dtype)
    return read, torch.zeros_like(S).scatter(-1, index, weight).sum(1)


@pytest.mark.parametrize("terms", TERMS)
def test_similarity_is_the_distance(terms):
    args = {name: t.double() for name, t in inputs(2, 30, 11, 1, 9, 1, terms).items()}
    shift = similarity(**keys_of(args)) - distances(**keys_of(args))  # constant per query where nothing scales it
    assert (shift if "shrinkage" in terms else shift - shift[..., :1]).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", TERMS)
def test_forward(isa, terms, dtype):
    args = inputs(2, 700, 130, 2, 24, 40, terms, dtype)
    exact = {name: t.double() for name, t in args.items()}
    index = kept(args, 20)
    S = distances(**keys_of(exact))
    best, chosen = S.topk(20).values, S.gather(-1, index).sort(-1, descending=True).values
    assert (index.sort(-1).values.diff(dim=-1) > 0).all(), "a position was kept twice"
    assert (best - chosen).abs().max() <= 1e-5 * S.abs().max()
    assert (best != chosen).any(-1).double().mean() <= 0.02
    ours = memory_read(**args, top_k=20, return_usage=True)
    for what, *three in zip(("readout", "usage"), ours, read_of(args, index), read_of(exact, index), strict=True):
        assert_as_exact(*three, what=what)


@pytest.mark.parametrize("terms", TERMS)
def test_gradients(terms):
    args = inputs(2, 90, 33, 2, 12, 20, terms)
    index = kept(args, 9)
    out_grad = torch.randn(2, 2, 33, 20)

    def gradients(function, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in args.items()}
        return torch.autograd.grad(function(leaves), tuple(leaves.values()), out_grad.to(dtype))

    ours = gradients(lambda leaves: memory_read(**leaves, top_k=9), torch.float32)
    same = gradients(lambda leaves: read_of(leaves, index)[0], torch.float32)
    exact = gradients(lambda leaves: read_of(leaves, index)[0], torch.float64)
    for name, *three in zip(args, ours, same, exact, strict=True):
        assert_as_exact(*three, what=f"gradient of {name}")


@pytest.mark.parametrize("top_k", [7, None])
@pytest.mark.parametrize("terms", [(), *TERMS])
def test_usage_is_the_affinity_summed(terms, top_k):
    args = inputs(2, 40, 33, 1, 8, 1, terms)
    args["memory_value"] = torch.eye(40).expand(2, 1, 40, 40)  # reads the affinity itself
    affinity, usage = memory_read(**args, top_k=top_k, return_usage=True)
    torch.testing.assert_close(usage, affinity[:, 0].sum(1))
    assert usage.dtype == torch.float32 and not usage.requires_grad


def test_chunks_change_nothing(monkeypatch):
    args = {name: t.requires_grad_() for name, t in inputs(1, 50, 33, 2, 16, 24, TERMS[0]).items()}

    def run(top_k: int | None) -> list[Tensor]:
        out, usage = memory_read(**args, top_k=top_k, return_usage=True, backend="reference")
        return [out, usage, *torch.autograd.grad(out.square().sum(), tuple(args.values()))]

    whole = run(6), run(None)
    monkeypatch.setitem(memory_read.__globals__, "_AFFINITY_FLOATS", 500)
    for a, b in zip((*run(6), *run(None)), (*whole[0], *whole[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_ones_change_nothing():
    args = inputs(1, 300, 65, 2, 64, 32, ())
    ones = dict(shrinkage=torch.ones(1, 300), selection=torch.ones(1, 65, 64))
    torch.testing.assert_close(memory_read(**args, **ones), memory_read(**args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["memory_key", "query_key", "shrinkage", "selection"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_any_values_come_back(isa, where, bad):
    args = inputs(1, 120, 70, 1, 16, 24, TERMS[0])
    args[where].flatten()[::397] = bad
    leaves = [t.requires_grad_() for t in args.values()]
    out, usage = memory_read(**args, top_k=8, return_usage=True)
    torch.autograd.grad(out.sum(), leaves)  # must come back, whatever the values
    assert usage.shape == (1, 120)
    if where in ("query_key", "selection"):  # three of the 70 queries are touched
        assert out.isfinite().all(-1).sum() >= 67


@pytest.mark.parametrize("empty", ["N", "M", "O"])
def test_empty_inputs(empty):
    args = inputs(**(dict(B=2, N=9, M=4, O=3, CK=8, CV=6) | {empty: 0}), terms=TERMS[0])
    leaves = [t.requires_grad_() for t in args.values()]
    out, usage = memory_read(**args, return_usage=True)
    assert usage.shape == args["shrinkage"].shape and (usage == 0).all() and (out == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), leaves))


def test_compile():
    args = inputs(1, 60, 30, 2, 16, 24, TERMS[0])
    compiled = torch.compile(lambda **t: memory_read(**t, top_k=7, return_usage=True), fullgraph=True)
    torch.testing.assert_close(compiled(**args), memory_read(**args, top_k=7, return_usage=True))


def test_opcheck_of_the_dot_form():
    args = [torch.randn(*shape, requires_grad=True) for shape in ((1, 30, 8), (1, 2, 30, 12), (1, 21, 8))]
    torch.library.opcheck(torch.ops.pyvseg.memory_read.default, (*args, 5, True))


def test_wrong_arguments():
    args = inputs(1, 9, 4, 2, 8, 6, TERMS[0])
    for message, change in {
        r"shrinkage must be \(B=1, N=9\)": dict(shrinkage=torch.ones(1, 8)),
        "shrinkage must have 2 dimensions": dict(shrinkage=torch.ones(1, 1, 9)),
        r"selection must have query_key's shape \(1, 4, 8\)": dict(selection=torch.ones(1, 4, 9)),
        "selection is on meta": dict(selection=torch.ones(1, 4, 8, device="meta")),
    }.items():
        with pytest.raises(ValueError, match=message):
            memory_read(**(args | change))
    with pytest.raises(TypeError, match="selection must be float32, bfloat16 or float16, got torch.int64"):
        memory_read(**(args | dict(selection=torch.ones(1, 4, 8, dtype=torch.int64))))


def test_published_results(isa):
    folder = shared("parity", "ops-memory_read")
    tolerance = json.loads((folder / "manifest.json").read_text())["tolerance"]
    with np.load(folder / "tensors.npz") as stored:
        load = lambda kind, name: torch.from_numpy(stored[f"{kind}/aniso/{name}"]).float().flatten(2).mT  # noqa: E731
        args = dict(memory_key=load("in", "mk"), memory_value=load("in", "mv")[None], query_key=load("in", "qk"))
        args |= dict(shrinkage=load("in", "ms")[..., 0], selection=load("in", "qe"))
        readout, usage = memory_read(**args, top_k=30, return_usage=True)
        torch.testing.assert_close(readout[0], load("out", "readout"), **tolerance)
        torch.testing.assert_close(usage, torch.from_numpy(stored["out/aniso/usage"]), **tolerance)
