# SPDX-License-Identifier: Apache-2.0
"""Checks and choice of backend run once for calls that look alike, and again for any that does not."""

import pytest
import torch

from pyvseg.ops import _dispatch, memory_match

pytestmark = pytest.mark.skipif(_dispatch.extension is None, reason="pyvseg._C is not compiled: every call is checked")


@pytest.fixture
def planned():
    """(function, its calls): what `planned` makes of a plan that accepts everything but -1."""
    calls = []

    @_dispatch.planned
    def plan(*args) -> str:
        calls.append(args)
        if -1 in [x for x in args if isinstance(x, int)]:
            raise ValueError("-1")
        return f"plan {len(calls)}"

    yield plan, calls
    _dispatch._plans.pop()


def test_a_plan_is_made_once_for_calls_that_look_alike(planned):
    plan, calls = planned
    given = lambda: (torch.rand(2, 3), None, "sum", 1.5, True, [(4, 5)], [torch.zeros(2)])  # noqa: E731
    assert {plan(*given()) for _ in range(3)} == {"plan 1"} and len(calls) == 1
    assert plan(torch.nn.Parameter(torch.rand(2, 3), requires_grad=False), *given()[1:]) == "plan 1"


@pytest.mark.parametrize(
    "other",
    [
        (torch.rand(3, 2), 1), (torch.rand(2, 3, 1), 1), (torch.rand(2, 3).half(), 1), (torch.rand(2, 3, device="meta"), 1),
        (torch.rand(2, 3, requires_grad=True), 1), (torch.rand(2, 3), 2), (torch.rand(2, 3), 1.0), (torch.rand(2, 3), True),
        (torch.rand(2, 3), None), (torch.rand(2, 3), "1"), (torch.rand(2, 3), [1]), (torch.rand(2, 3),), (torch.rand(2, 3), 1, 1),
    ],
    ids=str,
)  # fmt: skip
def test_any_difference_makes_a_new_plan(planned, other):
    plan, calls = planned
    plan(torch.rand(2, 3), 1)
    assert plan(*other) == "plan 2" and plan(torch.rand(2, 3), 1) == "plan 1"


def test_grad_mode_and_the_wished_backend_make_a_new_plan(planned):
    plan, calls = planned
    plan(1)
    with torch.no_grad():
        assert plan(1) == "plan 2"
    with _dispatch.backend("reference"):
        assert plan(1) == "plan 3"
    _dispatch.forget()
    assert plan(1) == "plan 4"


def test_nothing_is_known_of_refused_calls_and_of_arguments_without_a_signature(planned):
    plan, calls = planned
    for _ in range(2):
        with pytest.raises(ValueError, match="-1"):
            plan(-1)

    class Subclass(torch.Tensor):
        pass

    for other in (1 << 70, object(), torch.rand(2).as_subclass(Subclass), {}, "x" * 5000, "\ud800"):
        assert plan(other) != plan(other)


def test_a_process_does_not_remember_without_end(planned):
    plan, calls = planned
    for i in range(_dispatch._KNOWN + 10):
        plan(i)
    assert len(_dispatch._plans[-1]) == 10 and plan(0) != "plan 1"


def test_a_wrong_call_is_refused_after_a_right_one():
    right = torch.rand(3, 8), torch.rand(4, 8)
    for _ in range(2):
        memory_match(*right)
    for wrong in (dict(temperature=-1.0), dict(metric="none"), dict(backend="none"), dict(labels=torch.zeros(3, dtype=torch.int64))):
        with pytest.raises(ValueError):
            memory_match(*right, **wrong)


def test_gradients_are_asked_for_within_lists():
    wanted = torch.rand(1, requires_grad=True)
    ask = _dispatch.extension.requires_grad
    assert ask((1, [torch.rand(1), wanted])) and ask((wanted,)) and not ask((None, [torch.rand(1)], "x", [], 2.0))
