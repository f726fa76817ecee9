# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyvseg.ops import point_sample
from pyvseg.ops.point_sample import reference
from tests.ops.numerics import assert_as_exact

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def around(*shape: int) -> Tensor:
    """Points inside, on the border and outside."""
    return torch.rand(*shape, 2) * 1.4 - 0.2


def compare(masks: Tensor, points: Tensor) -> None:
    planes = masks if masks.ndim == 4 else masks[:, None]
    mine = point_sample(masks, points).reshape(*planes.shape[:2], points.shape[-2])
    assert_as_exact(mine, reference(planes, points), reference(planes.double(), points.double()))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
@pytest.mark.parametrize("each", [False, True])
def test_samples(isa, dtype, each):
    masks = torch.randn(5, 3, 13, 22)
    compare(masks > 0 if dtype == torch.bool else masks.to(dtype), around(5, 300) if each else around(300))


@settings(max_examples=60, deadline=None)
@given(
    *(st.integers(0, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 40)),
    *(st.booleans(), st.sampled_from([*DTYPES, torch.bool]), st.integers(0, 2**31)),
)
def test_any_shape(n, height, width, k, each, dtype, seed):
    torch.manual_seed(seed)
    masks = torch.randn(n, height, width)
    compare(masks > 0 if dtype == torch.bool else masks.to(dtype), around(n, k) if each else around(k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("each", [False, True])
def test_gradient(isa, dtype, each):
    masks, points = torch.randn(3, 2, 7, 11).to(dtype), around(3, 50) if each else around(50)
    weight = torch.randn(3, 2, 50).to(dtype)

    def gradient(function, masks: Tensor) -> Tensor:
        masks = masks.detach().clone().requires_grad_()
        return torch.autograd.grad((function(masks, points.to(masks.dtype) if masks.dtype == torch.float64 else points) * weight).sum(), masks)[0]

    assert_as_exact(gradient(point_sample, masks), gradient(reference, masks), gradient(reference, masks.double()))


def test_pixel_centres_and_outside(isa):
    masks = torch.arange(6.0).reshape(1, 2, 3) + 1
    centres = torch.stack(torch.meshgrid((torch.arange(3) + 0.5) / 3, (torch.arange(2) + 0.5) / 2, indexing="xy"), -1)
    torch.testing.assert_close(point_sample(masks, centres.reshape(-1, 2))[0], masks.flatten())
    nan, inf = float("nan"), float("inf")
    outside = [[-0.3, 0.5], [0.5, 1.3], [nan, 0.5], [0.5, nan], [inf, 0.5], [0.5, -inf], [3e38, 0.5], [-1e9, 1e9]]
    assert torch.equal(point_sample(masks, torch.tensor(outside)), torch.zeros(1, 8))


def test_no_infinity_from_beyond_the_border():
    for corner, at in (((0, 0), [0.0, 0.0]), ((2, 2), [1.0, 1.0]), ((0, 2), [1.0, 0.0])):
        masks = torch.full((1, 3, 3), float("inf"))
        masks[(0, *corner)] = 1.0
        assert point_sample(masks, torch.tensor([at])).item() == 0.25


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
@pytest.mark.parametrize("size", [(12, 30), (40, 1), (1, 40), (2, 2)])
def test_strides_are_read_in_place_or_copied(isa, dtype, size):
    height, width = size
    dense = torch.randn(3, 2, height, width)
    dense = dense > 0 if dtype == torch.bool else dense.to(dtype)
    room = dense.new_zeros(3, height, 2, 2 * width)
    room[..., ::2] = dense.transpose(1, 2)
    for few in (1, 5, 200):
        points = around(few)
        expected = point_sample(dense, points)
        for strided in (dense.mT.contiguous().mT, room[..., ::2].transpose(1, 2), dense[:, :1].expand(-1, 2, -1, -1)):
            assert torch.equal(point_sample(strided, points), expected if strided.stride(1) else expected[:, :1].expand(-1, 2, -1))


@pytest.mark.parametrize("n, t, size, k", [(0, 2, (4, 5), 7), (2, 0, (4, 5), 7), (2, 3, (0, 5), 7), (2, 3, (4, 5), 0)])
def test_nothing_to_sample(n, t, size, k):
    masks = torch.randn(n, t, *size, requires_grad=True)
    samples = point_sample(masks, torch.rand(k, 2))
    assert samples.shape == (n, t, k) and (samples == 0).all()
    assert torch.equal(torch.autograd.grad(samples.sum(), masks)[0], torch.zeros_like(masks))


def test_non_contiguous_and_opcheck():
    masks, points = torch.randn(4, 6, 9, 10), torch.rand(2, 33).T
    view = masks[::2].transpose(2, 3)
    assert torch.equal(point_sample(view, points), point_sample(view.contiguous(), points.contiguous()))
    torch.library.opcheck(torch.ops.pyvseg.point_sample.default, (masks.requires_grad_(), points[None]))
    torch.library.opcheck(torch.ops.pyvseg.point_sample_backward.default, (torch.randn(4, 6, 33), points[None], 9, 10))


BAD = {
    r"masks must be \(N, \*T, H, W\), got shape \(4, 4\)": (ValueError, torch.ones(4, 4), torch.rand(3, 2)),
    "masks must be floating point or bool, got torch.int64": (TypeError, torch.ones(4, 4, 4, dtype=torch.int64), torch.rand(3, 2)),
    "points must be floating point, got torch.int64": (TypeError, torch.ones(4, 4, 4), torch.ones(3, 2, dtype=torch.int64)),
    r"points must be \(K, 2\) or \(N=4, K, 2\), got shape \(3, 3\)": (ValueError, torch.ones(4, 4, 4), torch.rand(3, 3)),
    r"points must be \(K, 2\) or \(N=4, K, 2\), got shape \(5, 3, 2\)": (ValueError, torch.ones(4, 4, 4), torch.rand(5, 3, 2)),
    "points is on meta but masks on cpu": (ValueError, torch.ones(4, 4, 4), torch.rand(3, 2, device="meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments(message):
    error, masks, points = BAD[message]
    with pytest.raises(error, match=message):
        point_sample(masks, points)
