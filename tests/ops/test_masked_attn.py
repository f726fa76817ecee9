# SPDX-License-Identifier: Apache-2.0
"""Masked cross-attention against PyTorch's in float64."""

import pytest
import torch

from pyvseg.ops import masked_attn
from pyvseg.ops.masked_attn import reference
from tests.ops.numerics import assert_as_exact


def problem(B, N, M, C, dtype=torch.float32, spread=1.0):
    query, key, value = (torch.randn(B, n, C) for n in (N, M, M))
    masks = torch.randn(B, N, 1) + torch.randn(B, N, M)
    masks[0, 0], masks[-1, -1] = -1.0, 0.0  # nowhere: everywhere, and zero is not negative
    masks[-1, N // 2] = -1.0
    masks[-1, N // 2, M // 2] = 1.0  # a single key
    return [t.to(dtype) for t in (spread * query, key, value, masks)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "B, N, M, C, heads", [(2, 100, 240, 256, 8), (1, 3, 1, 32, 4), (1, 65, 70, 24, 1), (2, 5, 129, 120, 2), (1, 131, 64, 8, 8)]
)
def test_against_float64(isa, B, N, M, C, heads, dtype):
    inputs = problem(B, N, M, C, dtype)
    exact = reference(*(t.double() for t in inputs), heads)
    assert_as_exact(masked_attn(*inputs, heads, backend="cpu"), reference(*inputs, heads), exact)


def test_sharp_attention_and_strides(isa):
    inputs = [t.mT.contiguous().mT for t in problem(2, 9, 90, 32, spread=60.0)]
    exact = reference(*(t.double() for t in inputs), 2)
    assert_as_exact(masked_attn(*inputs, 2, backend="cpu"), reference(*inputs, 2), exact)


def test_what_is_masked_does_not_count(isa):
    query, key, value, masks = problem(1, 4, 100, 32)
    masks[:, :, 40:] = -1.0
    masks[:, :, 0] = 1.0
    short = masked_attn(query, key[:, :40], value[:, :40], masks[:, :, :40], 2, backend="cpu")
    key[:, 40:], value[:, 40:] = 1e30, torch.nan
    key[:, 64:] = torch.inf
    value[:, 40:64] = 1e30
    torch.testing.assert_close(masked_attn(query, key, value, masks, 2, backend="cpu"), short)


def test_gradients_are_those_of_the_reference():
    inputs = [t.requires_grad_() for t in problem(1, 4, 9, 16)]
    (masked_attn(*inputs, 2).square().sum()).backward()
    grads = [t.grad for t in inputs]
    assert grads.pop() is None
    reference(*(again := [t.detach().requires_grad_() for t in inputs]), 2).square().sum().backward()
    assert all(torch.equal(grad, t.grad) for grad, t in zip(grads, again))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"query": torch.zeros(4, 8)}, ValueError, "query must have three dimensions"),
        ({"key": torch.zeros(1, 5, 4)}, ValueError, "key must be"),
        ({"value": torch.zeros(1, 5, 8, dtype=torch.float64)}, TypeError, "value must have query's dtype"),
        ({"masks": torch.zeros(1, 3, 5, dtype=torch.bool)}, TypeError, "masks must be a floating-point tensor"),
        ({"masks": torch.zeros(1, 5, 3)}, ValueError, "masks must be"),
        ({"heads": 3}, ValueError, "heads must divide the 8 channels"),
    ],
)
def test_bad_input_is_named(change, error, message):
    inputs = dict(zip(("query", "key", "value", "masks"), problem(1, 3, 5, 8)), heads=2)
    with pytest.raises(error, match=message):
        masked_attn(**inputs | change)


def test_opcheck():
    torch.library.opcheck(torch.ops.pyvseg.masked_attn.default, (*problem(2, 5, 9, 16), 2))
