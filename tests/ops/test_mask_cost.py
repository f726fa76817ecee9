# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyvseg.ops import MaskCosts, mask_costs
from pyvseg.ops.mask_cost import reference
from tests.ops.numerics import assert_as_exact

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [torch.bool, *DTYPES]  # of targets


def problem(n: int, m: int, *size: int, dtype=torch.float32, kind=torch.bool) -> tuple[Tensor, Tensor]:
    targets = torch.rand(m, *size)
    return (torch.randn(n, *size) * 5 - 1).to(dtype), targets < 0.2 if kind == torch.bool else targets.to(kind)


def check(mine: MaskCosts, logits: Tensor, targets: Tensor) -> None:
    logits, targets = logits.flatten(1), targets.flatten(1)
    for name, *three in zip(MaskCosts._fields, mine, reference(logits, targets), reference(logits.double(), targets)):
        assert_as_exact(*three, what=name)


@pytest.mark.parametrize("n, m, size", [(7, 5, (3, 20, 33)), (1, 1, (1,)), (4, 3, (1024,)), (33, 8, (2, 1111)), (2, 20, (9000,)), (70, 3, (130,))])
def test_costs(isa, n, m, size):
    logits, targets = problem(n, m, *size)
    check(mask_costs(logits, targets), logits, targets)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_dtypes(isa, dtype, kind):
    logits, targets = problem(5, 4, 1100, dtype=dtype, kind=kind)
    mine = mask_costs(logits, targets)
    assert mine.dice.dtype == mine.bce.dtype == torch.float32
    check(mine, logits, targets)


def gradients(function, logits: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in (logits, targets)]
    dice, bce = function(*leaves)
    return torch.autograd.grad((torch.stack([dice, bce]) * weight).sum(), [t for t in leaves if t.requires_grad])


@pytest.mark.parametrize("n, m, p", [(9, 5, 1500), (4, 3, 48), (3, 1, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(isa, dtype, n, m, p):
    logits, targets = problem(n, m, p, dtype=dtype, kind=torch.float32)
    weight = torch.randn(2, n, m)
    mine, same = gradients(mask_costs, logits, targets, weight), gradients(reference, logits, targets, weight)
    for name, *three in zip(("logits", "targets"), mine, same, gradients(reference, logits.double(), targets.double(), weight)):
        assert_as_exact(*three, what=name)


def test_gradient_of_one_cost_alone():
    logits, targets = problem(3, 2, 100)
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    for cost in (0, 1):
        mine, theirs = (torch.autograd.grad(f(x, targets)[cost].sum(), x)[0] for f, x in ((mask_costs, logits), (reference, exact)))
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2100), st.sampled_from(KINDS), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_any_shape(n, m, p, kind, dtype, seed):
    torch.manual_seed(seed)
    logits, targets = problem(n, m, p, dtype=dtype, kind=kind)
    logits.requires_grad_()
    mine = mask_costs(logits, targets)
    check(MaskCosts(*(cost.detach() for cost in mine)), logits.detach(), targets)
    grad = torch.autograd.grad(mine.dice.sum() + mine.bce.sum(), logits)[0]
    assert grad.shape == logits.shape and grad.isfinite().all()


def test_extreme_logits(isa):
    edge = torch.tensor([0.0, -0.0, 88.0, -88.0, 200.0, -200.0, 1e30, -1e30, 1e-40, -1e-40])
    logits, on = edge.repeat(13, 1).T.contiguous(), torch.ones(1, 13, dtype=torch.bool)
    for targets in (on, ~on):
        dice, bce = mask_costs(logits, targets)
        exact = reference(logits.double(), targets)
        torch.testing.assert_close(dice, exact.dice.float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(bce, exact.bce.float(), rtol=1e-6, atol=1e-6)


def test_nan_and_infinity_stay_in_their_row(isa):
    logits, targets = problem(9, 4, 2000)
    clean = mask_costs(logits, targets)
    logits[2, 77] = float("nan")
    logits[5, 1999] = -float("nan")
    logits[6, 3] = float("inf")
    dirty = mask_costs(logits, targets)
    for cost, before in zip(dirty, clean):
        assert cost[[2, 5]].isnan().all()
        kept = [0, 1, 3, 4, 7, 8]
        assert torch.equal(cost[kept], before[kept])
    assert not dirty.bce[6].isfinite().any()


@pytest.mark.parametrize("n, m, size", [(0, 3, (4, 5)), (3, 0, (4, 5)), (2, 3, (0, 5)), (0, 0, (0,))])
def test_nothing_to_match(n, m, size):
    logits, targets = problem(n, m, *size)
    logits.requires_grad_()
    mine = mask_costs(logits, targets)
    assert mine.dice.shape == mine.bce.shape == (n, m)
    assert (mine.dice == 0).all() and (mine.bce == 0).all()
    assert torch.equal(torch.autograd.grad(sum(cost.sum() for cost in mine), logits)[0], torch.zeros_like(logits))


def test_non_contiguous():
    logits, targets = problem(8, 6, 40, 30)
    views = logits[::2].transpose(1, 2), targets[1::2].transpose(1, 2)
    for mine, theirs in zip(mask_costs(*views), mask_costs(*(v.contiguous() for v in views))):
        assert torch.equal(mine, theirs)
    padded = torch.randn(5, 64)[:, 3:50]  # rows apart, pixels side by side
    check(mask_costs(padded, targets.flatten(1)[:, :47]), padded, targets.flatten(1)[:, :47])


def test_same_bits_whatever_the_threads():
    logits, targets = problem(70, 9, 30000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(mask_costs(logits, targets))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].dice, other.dice) and torch.equal(results[0].bce, other.bce)


def test_points_are_mask2formers_costs():
    """Its matcher, written out: both sides sampled from their own size, then the published sums."""
    logits, targets, points = torch.randn(6, 2, 12, 17), torch.rand(4, 2, 48, 68) < 0.3, torch.rand(200, 2)

    def published(logits: Tensor, targets: Tensor, points: Tensor) -> MaskCosts:
        grid = 2 * points[None, :, None] - 1
        sample = lambda masks: F.grid_sample(masks, grid.expand(len(masks), -1, -1, -1), align_corners=False).flatten(1)  # noqa: E731
        return reference(sample(logits), sample(targets))

    exact = published(logits.double(), targets.double(), points.double())
    for name, *three in zip(MaskCosts._fields, mask_costs(logits, targets, points), published(logits, targets.float(), points), exact):
        assert_as_exact(*three, what=name)


def test_opcheck():
    logits, targets = problem(5, 3, 130, kind=torch.float32)
    logits.requires_grad_(), targets.requires_grad_()
    torch.library.opcheck(torch.ops.pyvseg.mask_cost.default, (logits, targets))
    grads = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5)
    torch.library.opcheck(torch.ops.pyvseg.mask_cost_backward.default, (*grads, logits.detach(), targets.detach()))


class Costs(torch.nn.Module):
    def forward(self, logits: Tensor, targets: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(mask_costs(logits, targets, points))


def test_compile_and_export():
    inputs = torch.randn(5, 3, 20, 30), torch.rand(4, 3, 40, 50) < 0.2, torch.rand(77, 2)
    eager = Costs()(*inputs)
    compiled, exported = torch.compile(Costs(), fullgraph=True), torch.export.export(Costs(), inputs).module()
    for other in (compiled(*inputs), exported(*inputs)):
        for mine, theirs in zip(eager, other):
            torch.testing.assert_close(mine, theirs)


BAD = {
    "logits must be a tensor, got list": (TypeError, [1], torch.ones(2, 8)),
    "logits must be floating point, got torch.bool": (TypeError, torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 8)),
    "targets must be floating point or bool, got torch.int64": (TypeError, torch.ones(2, 8), torch.ones(2, 8, dtype=torch.int64)),
    r"logits must be \(N, \*S\), got shape \(8,\)": (ValueError, torch.ones(8), torch.ones(8)),
    r"targets must be \(M, 8\) to go with logits, got shape \(2, 9\)": (ValueError, torch.ones(2, 8), torch.ones(2, 9)),
    r"targets must be \(M, 2, 4\) to go with logits, got shape \(2, 8\)": (ValueError, torch.ones(2, 2, 4), torch.ones(2, 8)),
    "targets is on meta but logits on cpu": (ValueError, torch.ones(2, 8), torch.ones(2, 8, device="meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments(message):
    error, logits, targets = BAD[message]
    with pytest.raises(error, match=message):
        mask_costs(logits, targets)


def test_direct_calls_of_the_ops_are_checked():
    masks, sums = torch.ones(3, 70, dtype=torch.bool), (torch.ones(3, 2), torch.ones(3, 2), torch.ones(3))
    for args in ((masks,), (masks.float()[:, 1:],)):
        with pytest.raises(RuntimeError, match="need"):
            torch.ops.pyvseg.mask_cost(*args, masks[:2])
        with pytest.raises(RuntimeError, match="need"):
            torch.ops.pyvseg.mask_cost_backward(*sums, *args, masks[:2])


def test_wrong_frames_with_points():
    with pytest.raises(ValueError, match=r"targets must be \(M, 2, H, W\) to go with logits, got shape \(3, 1, 8, 8\)"):
        mask_costs(torch.ones(3, 2, 4, 4), torch.ones(3, 1, 8, 8), torch.rand(5, 2))
