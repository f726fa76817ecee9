# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn

import pyvseg.ops as ops
from pyvseg.layers.conv import fast_conv3x3
from pyvseg.ops._dispatch import missing

needs_kernel = pytest.mark.skipif(bool(missing("conv3x3", "cpu")), reason=missing("conv3x3", "cpu"))


def pair(inputs: int, outputs: int, **kwargs) -> tuple[nn.Conv2d, nn.Module]:
    torch.manual_seed(inputs + outputs)
    conv = nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **kwargs}).requires_grad_(False)
    return conv, fast_conv3x3(conv)


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("inputs, outputs, way", [
    pytest.param(64, 48, "winograd", marks=needs_kernel),
    pytest.param(33, 65, "winograd", marks=needs_kernel),
    (64, 1, "taps"),
    (70, 2, "taps"),
    (3, 64, None),
    (64, 16, None),
])
@pytest.mark.parametrize("bias", [True, False])
def test_every_way_equals_the_convolution(inputs, outputs, way, bias):
    conv, fast = pair(inputs, outputs, bias=bias)
    x, residual = image(2, inputs, 13, 18), image(2, outputs, 13, 18)
    assert fast._way(x) == way
    exact = copy.deepcopy(conv).double()
    for _ in range(2):  # the second time with the weight prepared
        torch.testing.assert_close(fast(x).double(), exact(x.double()), rtol=0, atol=5e-6)
        want = exact(x.double().relu()) + residual
        before = residual.clone()
        torch.testing.assert_close(fast(x, relu_input=True, residual=residual).double(), want, rtol=0, atol=5e-6)
        assert torch.equal(residual, before)


@pytest.mark.parametrize("kwargs", [
    {"stride": 2}, {"padding": 0}, {"padding": 2, "dilation": 2}, {"groups": 2}, {"padding_mode": "reflect"}, {"padding": "same"},
])
def test_other_convolutions_are_left_as_they_are(kwargs):
    conv, fast = pair(64, 64, **kwargs)
    x = image(1, 64, 12, 12)
    assert fast._way(x) is None
    torch.testing.assert_close(fast(x, relu_input=True), conv(x.relu()), rtol=0, atol=0)


def test_small_images_bfloat16_and_gradients_take_the_convolution():
    conv, fast = pair(64, 64)
    assert fast._way(image(1, 64, 4, 4)) is None
    assert fast._way(image(1, 64, 16, 16).requires_grad_()) is None
    half = copy.deepcopy(fast).to(torch.bfloat16)
    x = image(1, 64, 16, 16).to(torch.bfloat16)
    assert half._way(x) is None and half(x, residual=x).dtype == torch.bfloat16


@needs_kernel
def test_reference_backend_takes_the_convolution():
    _, fast = pair(64, 64)
    with ops.backend("reference"):
        assert fast._way(image(1, 64, 16, 16)) is None


@pytest.mark.parametrize("outputs", [1, 64])
def test_prepared_weight_follows_the_module(outputs):
    conv, fast = pair(64, outputs)
    x = image(1, 64, 16, 16)
    first = fast(x)
    fast.load_state_dict({name: -2 * value for name, value in fast.state_dict().items()})
    torch.testing.assert_close(fast(x), -2 * first, rtol=1e-5, atol=1e-5)
    nn.Sequential(fast).to(torch.float64).to(torch.float32)
    torch.testing.assert_close(fast(x), -2 * first, rtol=1e-5, atol=1e-5)
    assert set(fast.state_dict()) == {"conv.weight", "conv.bias"}
