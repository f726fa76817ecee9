# SPDX-License-Identifier: Apache-2.0
"""The criterion of Tube-Link and the quasi-dense losses, beside their definitions in float64. Stored cases: tests/models/test_tube_link.py."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyvseg.training.quasi_dense import HARDEST, MARGIN, quasi_dense_losses
from pyvseg.training.set_criterion import SetCriterion, Target
from pyvseg.training.tube_link import TubeCriterion


class Given(NamedTuple):
    logits: Tensor
    masks: Tensor


def given(count=2, queries=9, classes=5):
    torch.manual_seed(0)
    return [Given(torch.randn(1, queries, classes + 1).requires_grad_(), torch.randn(1, queries, 2, 8, 10).requires_grad_()) for _ in range(count)]


def target(*labels):
    return Target(torch.tensor(labels, dtype=torch.int64), (torch.rand(len(labels), 2, 32, 40, generator=torch.manual_seed(1)) > 0.6).float())


def numbers():
    generator = torch.manual_seed(2)
    return lambda shape: torch.rand(shape, generator=generator)


def test_without_a_split_it_is_the_set_criterion_on_a_tall_image():
    predictions, wanted = given(1), target(0, 3, 3)
    losses = TubeCriterion(5, 64)(predictions, [wanted], random=numbers())
    tall = [Given(p.logits, p.masks.flatten(2, 3)) for p in predictions]
    exact, _ = SetCriterion(5, 64)(tall, [Target(wanted.labels, wanted.masks.flatten(1, 2))], random=numbers())
    assert list(losses) == ["loss_cls", "loss_mask", "loss_dice"]
    assert [loss.item() for loss in losses.values()] == [loss.item() for loss in exact.values()]


def test_stuff_has_queries_of_its_own():
    criterion = TubeCriterion(5, 64, things=3)
    predictions = given()
    criterion.total(criterion(predictions, [target(0, 2, 4)], random=numbers())).backward()
    grad = predictions[1].masks.grad[0].abs().flatten(1).sum(1)
    assert grad[8] > 0 and grad[7] == 0 and (grad[:7] > 0).sum() == 2  # class 4 is the last query's, things are matched among the first 7
    assert predictions[0].logits.grad.abs().sum(-1).all()


def test_without_stuff_things_go_to_stuff_queries_too():
    predictions = given()
    losses = TubeCriterion(5, 64, things=3)(predictions, [target(1, 2, 2)], random=numbers())
    sum(losses.values()).backward()
    grad = predictions[1].masks.grad[0].abs().flatten(1).sum(1)
    assert (grad[7:] > 0).all() and (grad[:7] > 0).sum() == 3  # -2 and -1 from the end; the last of two instances of a class
    assert len(losses) == 3 + 2 * 3


def test_a_tube_with_nothing_in_it():
    predictions = given()
    losses = TubeCriterion(5, 64, things=3)(predictions, [target()], random=numbers())
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values()) and losses["loss_mask"] == 0 and losses["loss_cls"] > 0


def defined(key, reference, same):
    rows = []
    for i in range(len(key)):
        dots = reference @ key[i]
        pairs = [torch.exp(dots[k] - dots[j]) for j in range(len(dots)) for k in range(len(dots)) if same[i, j] and not same[i, k]]
        if same[i].any():
            rows.append(torch.log(dots.new_ones(()) + sum(pairs)))
    positive, negative = [], []
    for i in range(len(key)):
        for j in range(len(reference)):
            cosine = torch.dot(key[i], reference[j]) / (key[i].norm() * reference[j].norm())
            (positive if same[i, j] else negative).append((cosine.clamp(0, 1) - 1) ** 2 if same[i, j] else (cosine - MARGIN).clamp(0, 1) ** 2)
    if len(negative) > HARDEST * (len(positive) + 1):
        negative = sorted(negative, reverse=True)[: HARDEST * len(positive)]
    return sum(rows) / max(len(rows), 1), sum(positive + negative) / max(len(positive + negative), 1)


def test_quasi_dense_losses_are_their_definition():
    torch.manual_seed(0)
    matches = {(5, 7): [(0, 3), (1, 1), (1, 2), (4, 6)], (3, 2): [(0, 0), (1, 1)], (2, 9): [(1, 4)], (2, 2): [(0, 0), (0, 1)]}
    for size, pairs in matches.items():
        same = torch.zeros(size, dtype=torch.bool)
        same[tuple(zip(*pairs))] = True
        ours = [torch.randn(n, 8).requires_grad_() for n in size]
        exact = [x.detach().double().requires_grad_() for x in ours]
        for loss, due in zip(quasi_dense_losses(*ours, same), defined(*exact, same)):
            (loss + 0 * sum(x.sum() for x in ours)).backward(retain_graph=True)
            (due + 0 * sum(x.sum() for x in exact)).backward(retain_graph=True)
            assert torch.allclose(loss.double(), due, atol=1e-6)
        assert all(torch.allclose(a.grad.double(), b.grad, atol=1e-5) for a, b in zip(ours, exact))


def test_embeddings_without_a_match_teach_nothing_but_that():
    key, reference = torch.randn(3, 8).requires_grad_(), torch.randn(4, 8)
    contrastive, cosine = quasi_dense_losses(key, reference, torch.zeros(3, 4, dtype=torch.bool))
    (contrastive + cosine).backward()
    assert contrastive == 0 and torch.isfinite(key.grad).all()
