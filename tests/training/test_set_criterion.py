# SPDX-License-Identifier: Apache-2.0
"""The criteria of the query-based systems beyond their stored cases."""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pyvseg.ops import point_sample
from pyvseg.training.contrastive import contrastive_losses
from pyvseg.training.set_criterion import SetCriterion, Target, solve


class Given(NamedTuple):
    logits: Tensor
    masks: Tensor


CRITERION = SetCriterion(classes=3, points=64)


def prediction(batch=2, queries=6, frames=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, queries, 4, generator=generator).requires_grad_()
    return Given(logits, torch.randn(batch, queries, *frames, 8, 12, generator=generator).requires_grad_())


def target(count, frames=()):
    masks = torch.zeros(count, *frames, 16, 24)
    for i in range(count):
        masks[i, ..., 2 * i : 2 * i + 5, 3 : 3 + 4 * (i + 1)] = 1
    return Target(torch.arange(count) % 3, masks)


@pytest.mark.parametrize("frames", [(), (2,)])
@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (3, 7)])
def test_any_number_of_instances(counts, frames):
    given = [prediction(frames=frames, seed=i) for i in range(2)]
    losses, matches = CRITERION(given, [target(n, frames) for n in counts])
    assert set(losses) == {f"loss_{what}{suffix}" for what in ("ce", "mask", "dice") for suffix in ("", "_0")}
    total = CRITERION.total(losses)
    total.backward()
    assert torch.isfinite(total) and all(torch.isfinite(x.grad).all() for p in given for x in p)
    assert [len(queries) for queries, _ in matches[-1]] == [min(n, 6) for n in counts]
    if not any(counts):
        assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0


def test_the_right_answer_is_found():
    wanted = target(3)
    masks = torch.full((1, 6, 16, 24), -20.0)
    masks[0, [4, 0, 5]] = 40 * wanted.masks - 20
    logits = torch.zeros(1, 6, 4)
    logits[..., 3] = 20
    logits[0, [4, 0, 5]] = 20 * torch.nn.functional.one_hot(wanted.labels, 4).float()
    losses, matches = CRITERION([Given(logits, masks)], [wanted])
    queries, found = matches[0][0]
    assert dict(zip(found.tolist(), queries.tolist())) == {0: 4, 1: 0, 2: 5}
    wrong, _ = CRITERION([Given(logits, -masks)], [wanted])
    assert losses["loss_ce"] < 1e-6
    assert losses["loss_mask"] < wrong["loss_mask"] / 4 and losses["loss_dice"] < wrong["loss_dice"] / 2


def test_points_are_the_uncertain_ones():
    logits = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = []
    points = CRITERION.uncertain_points(logits, lambda shape: drawn.append(torch.rand(shape)) or drawn[-1])
    assert points.shape == (2, 64, 2) and drawn[0].shape == (2, 192, 2)
    margin = point_sample(logits, drawn[0]).abs()
    torch.testing.assert_close(point_sample(logits, points[:, :48]).abs().sort().values, margin.sort().values[:, :48])
    assert torch.equal(points[:, 48:], drawn[1])


def test_frames_of_an_instance_together_or_apart():
    generator = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(4, 8, 8, generator=generator), (torch.rand(4, 8, 8, generator=generator) > 0.5).float()
    random = lambda: lambda shape, g=torch.Generator().manual_seed(2): torch.rand(shape, generator=g)  # noqa: E731
    apart = CRITERION.mask_losses(logits, truth, 2.0, random())
    together = CRITERION.mask_losses(logits, truth, 2.0, random(), together=2)
    torch.testing.assert_close(apart["loss_mask"], 2 * together["loss_mask"])
    assert not torch.allclose(apart["loss_dice"], 2 * together["loss_dice"])


def test_assignment_is_the_cheapest_and_survives_nan():
    costs = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    queries, found = solve(costs)
    best = min(sum(costs[q, t] for t, q in enumerate(p)) for p in itertools.permutations(range(4), 3))
    torch.testing.assert_close(costs[queries, found].sum(), best)
    costs[2, 1] = torch.nan
    assert sorted(solve(costs)[1].tolist()) == [0, 1, 2]


def test_contrast_without_pairs_is_zero_and_differentiable():
    x = torch.randn(3, 4, 8, requires_grad=True)
    matches = [[(torch.tensor([1]), torch.tensor([0]))] for _ in range(3)]
    once = torch.tensor([[True, False, False]])
    reid, aux = contrastive_losses(x, matches, [once], coin=lambda: 0.9)
    (reid + aux).backward()
    assert reid == 0 and aux == 0 and not x.grad.any()


def test_contrast_separates():
    def loss(other):
        x = torch.zeros(2, 2, 4)
        x[:, 0, 0] = 3.0
        x[:, 1] = other
        matches = [[(torch.tensor([0]), torch.tensor([0]))] for _ in range(2)]
        return contrastive_losses(x, matches, [torch.tensor([[True, True]])], coin=lambda: 0.9)[0]

    assert loss(torch.tensor([0.0, 3.0, 0.0, 0.0])) < 1e-3 < loss(torch.tensor([3.0, 0.0, 0.0, 0.0]))
