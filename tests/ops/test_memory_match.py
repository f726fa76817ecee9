# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyvseg.ops import greedy_assignment, hungarian_assignment, memory_match
from pyvseg.ops.memory_match import METRICS, reference, reference_greedy
from tests.ops.numerics import assert_as_exact

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(n: int, m: int, c: int, *batch: int, dtype=torch.float32) -> dict[str, Tensor]:
    scale = max(c, 1) ** -0.25
    return {
        "embeddings": (torch.randn(*batch, n, c) * scale).to(dtype),
        "memory": (torch.randn(*batch, m, c) * scale).to(dtype),
        "labels": torch.randint(0, 3, (*batch, n)),
        "memory_labels": torch.randint(0, 3, (*batch, m)),
    }


def plain(embeddings: Tensor, memory: Tensor, metric: str = "bisoftmax", labels: Tensor | None = None, memory_labels: Tensor | None = None) -> Tensor:
    return reference(embeddings, memory, metric, labels, memory_labels)


def check(given: dict[str, Tensor], metric: str = "bisoftmax") -> None:
    exact = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    assert_as_exact(memory_match(**given, metric=metric), plain(**given, metric=metric), plain(**exact, metric=metric))


@pytest.mark.parametrize("n, m, c", [(7, 5, 256), (100, 130, 32), (1, 1, 1), (3, 70, 19), (66, 2, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bisoftmax(isa, dtype, n, m, c):
    given = problem(n, m, c, dtype=dtype)
    check(given)
    check({name: given[name] for name in ("embeddings", "memory")})


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_and_batches(metric):
    given = problem(6, 9, 24, 2, 3)
    check(given, metric)
    one = {name: x[1, 2] for name, x in given.items()}
    torch.testing.assert_close(memory_match(**given, metric=metric)[1, 2], memory_match(**one, metric=metric))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(0, 70), st.integers(0, 40), st.integers(0, 3), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_any_shape(n, m, c, batch, dtype, seed):
    torch.manual_seed(seed)
    check(problem(n, m, c, batch, dtype=dtype))


def test_saturation_is_exactly_half(isa):
    """Each row has one winner and each column another, and both softmaxes are 0 or 1 in float32."""
    embeddings = torch.tensor([[0.0, 300.0], [400.0, 500.0]])
    scores = memory_match(embeddings, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(scores, torch.tensor([[0.0, 0.5], [0.5, 1.0]]))
    assert greedy_assignment(scores, 0.5).tolist() == [-1, 1]


def test_accumulates_in_float32(isa):
    """Products of 256 bfloat16 numbers whose sum a bfloat16 would round to another winner."""
    embeddings = torch.ones(1, 256, dtype=torch.bfloat16)
    memory = torch.ones(2, 256, dtype=torch.bfloat16)
    memory[1, 0] = 1.5
    assert memory_match(embeddings, memory).argmax().item() == 1


def test_locations():
    given = problem(5, 8, 16)
    here, there = torch.rand(5, 4), torch.rand(8, 4)
    scores = memory_match(**given, metric="cosine", locations=here, memory_locations=there, temperature=0.5)
    distance = (here[:, None] - there).norm(dim=-1)
    torch.testing.assert_close(scores, plain(**given, metric="cosine") * (-distance / 0.5).exp())


def test_nan_and_infinity(isa):
    given = problem(5, 6, 40)
    given["embeddings"][2, 3] = float("nan")
    given["memory"][4, 0] = float("inf")
    mine, theirs = memory_match(**given), plain(**given)
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert greedy_assignment(mine, 0.0).shape == hungarian_assignment(mine).shape == (5,)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, with_labels):
    given = problem(6, 9, 24, 2, dtype=dtype)
    weight = torch.randn(2, 6, 9)
    labels = {name: given[name] for name in ("labels", "memory_labels")} if with_labels else {}

    def gradients(function, dtype) -> tuple[Tensor, ...]:
        leaves = [given[name].detach().to(dtype).requires_grad_() for name in ("embeddings", "memory")]
        return torch.autograd.grad((function(*leaves, **labels) * weight).sum(), leaves)

    for name, *three in zip(("embeddings", "memory"), gradients(memory_match, dtype), gradients(plain, dtype), gradients(plain, torch.float64)):
        assert_as_exact(*three, what=name)


def test_non_contiguous():
    given = problem(8, 10, 12)
    views = {name: x[::2] for name, x in given.items()}
    assert torch.equal(memory_match(**views), memory_match(**{name: x.clone() for name, x in views.items()}))
    swapped = given["embeddings"].T.contiguous().T
    assert torch.equal(memory_match(swapped, given["memory"]), memory_match(given["embeddings"], given["memory"]))


def test_opcheck_and_compile():
    given = problem(5, 6, 16, 2)
    leaves = [given[name].requires_grad_() for name in ("embeddings", "memory")]
    for labels in ([None, None], [given["labels"], given["memory_labels"]]):
        torch.library.opcheck(torch.ops.pyvseg.memory_match.default, (*leaves, *labels))
    compiled = torch.compile(lambda given: memory_match(**given), fullgraph=True)
    torch.testing.assert_close(compiled(given), memory_match(**given))


def greedy_cases():
    for seed, claimed, weighted in itertools.product(range(3), (False, True), (False, True)):
        torch.manual_seed(seed)
        scores = (torch.rand(2, 12, 9) * 8).round() / 8  # many ties
        scores[0, 3, 2] = float("nan")
        yield scores, torch.randint(1, 9, (2, 9)).float() if weighted else None, torch.rand(2, 12, 9) < 0.7 if claimed else None


def test_greedy_is_its_definition(isa):
    for scores, weights, claims in greedy_cases():
        for threshold in (0.0, 0.3, 0.5, 1.0):
            mine = greedy_assignment(scores, threshold, weights=weights, claims=claims)
            assert torch.equal(mine, reference_greedy(scores, threshold, weights, claims)), (threshold, weights, claims)


def test_greedy_frame_weight():
    """An old track beats a better new one as soon as both are above the threshold, and not before."""
    weights = torch.tensor([1.0, 10.0])
    assert greedy_assignment(torch.tensor([[0.6, 0.35]]), 0.3, weights=weights).tolist() == [1]
    assert greedy_assignment(torch.tensor([[0.6, 0.25]]), 0.3, weights=weights).tolist() == [0]


def test_greedy_claims():
    """A detection of low confidence, and then a backdrop, match without taking the column."""
    scores = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.7, 0.6], [0.0, 0.9], [0.0, 0.8]])
    confident = torch.tensor([False, True, True, True, True])
    assert greedy_assignment(scores, 0.5, claims=confident[:, None]).tolist() == [0, 0, 1, -1, -1]
    assert greedy_assignment(scores, 0.5, claims=torch.tensor([True, False])).tolist() == [0, -1, 1, 1, 1]


@pytest.mark.parametrize("assign", [hungarian_assignment, lambda scores: greedy_assignment(scores, 0.5)])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (2, 3, 0), (0, 3, 4)])
def test_nothing_to_assign(assign, shape):
    match = assign(torch.zeros(shape))
    assert match.shape == shape[:-1] and match.dtype == torch.int64 and (match == -1).all()


@pytest.mark.parametrize("n, m", [(4, 4), (3, 5), (5, 3)])
def test_hungarian_is_the_best_of_all(n, m):
    scores = torch.randn(3, n, m)
    for match, problem_ in zip(hungarian_assignment(scores), scores):
        kept = match >= 0
        assert kept.sum() == min(n, m) and match[kept].unique().numel() == min(n, m)
        total = problem_[kept, match[kept]].sum()
        wide = problem_ if n <= m else problem_.T
        best = max(sum(row[j] for row, j in zip(wide, order)) for order in itertools.permutations(range(max(n, m)), min(n, m)))
        torch.testing.assert_close(total, best)


def test_hungarian_threshold_and_unusable_scores():
    scores = torch.tensor([[0.9, 0.8], [0.8, 0.1]])
    assert hungarian_assignment(scores).tolist() == [1, 0]
    assert hungarian_assignment(scores, 0.8).tolist() == [-1, -1]
    scores[1, 0] = float("nan")
    assert hungarian_assignment(scores).tolist() == [0, 1]
    assert hungarian_assignment(torch.full((2, 3), float("nan"))).tolist() == [-1, -1]


E, M = torch.ones(4, 8), torch.ones(5, 8)
LABELS = torch.zeros(4, dtype=torch.long), torch.zeros(5, dtype=torch.long)
BAD = {
    "metric must be one of dot, cosine, softmax, bisoftmax, got 'l2'": (ValueError, (E, M, "l2"), {}),
    "temperature must be positive, got 0": (ValueError, (E, M), {"temperature": 0}),
    "embeddings must be a floating-point tensor, got torch.int64": (TypeError, (E.long(), M), {}),
    r"embeddings must be \(\*B, N, C\), got shape \(8,\)": (ValueError, (E[0], M), {}),
    "memory must have embeddings' dtype torch.float32, got torch.float16": (TypeError, (E, M.half()), {}),
    r"memory must be \('M', 8\) to go with embeddings, got shape \(5, 7\)": (ValueError, (E, M[:, 1:]), {}),
    "labels and memory_labels go together": (ValueError, (E, M), {"labels": LABELS[0]}),
    "labels must be a tensor of integers, got float": (TypeError, (E, M), {"labels": 1.5, "memory_labels": LABELS[1]}),
    "memory_locations must be a floating-point tensor, got torch.int64": (TypeError, (E, M), {"locations": torch.ones(4, 4), "memory_locations": LABELS[1]}),
    "memory_labels must be a tensor of integers, got torch.float32": (TypeError, (E, M), {"labels": LABELS[0], "memory_labels": torch.zeros(5)}),
    r"labels must be \(4,\), got shape \(5,\)": (ValueError, (E, M), {"labels": LABELS[1], "memory_labels": LABELS[1]}),
    r"memory_locations must be \(5, 'D'\), got shape \(5, 3\)": (ValueError, (E, M), {"locations": torch.ones(4, 4), "memory_locations": torch.ones(5, 3)}),
    "memory is on meta but embeddings on cpu": (ValueError, (E, M.to("meta")), {}),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments(message):
    error, args, options = BAD[message]
    with pytest.raises(error, match=message):
        memory_match(*args, **options)


@pytest.mark.parametrize("error, message, scores, threshold, options", [
    (TypeError, "scores must be a floating-point tensor, got torch.int64", LABELS[0], 0.5, {}),
    (ValueError, r"scores must be \(\*B, N, M\), got shape \(4,\)", E[:, 0], 0.5, {}),
    (ValueError, "threshold must be at least 0, which a taken track scores, got -0.1", E, -0.1, {}),
    (ValueError, r"weights must be \(8,\) to go with scores, got shape \(4,\)", E, 0.5, {"weights": torch.ones(4)}),
    (TypeError, "claims must be bool, got torch.float32", E, 0.5, {"claims": E}),
])  # fmt: skip
def test_wrong_assignments(error, message, scores, threshold, options):
    with pytest.raises(error, match=message):
        greedy_assignment(scores, threshold, **options)
