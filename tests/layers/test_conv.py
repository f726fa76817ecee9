# SPDX-License-Identifier: Apache-2.0
import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyvseg.ops as ops
from pyvseg.layers.conv import fast_conv
from pyvseg.layers.packed import Linear, pack_conv
from pyvseg.ops._dispatch import missing

needs_kernel = pytest.mark.skipif(bool(missing("conv3x3", "cpu")), reason=missing("conv3x3", "cpu"))


def pair(inputs: int, outputs: int, **kwargs) -> tuple[nn.Conv2d, nn.Module]:
    torch.manual_seed(inputs + outputs)
    conv = nn.Conv2d(inputs, outputs, **{"kernel_size": 3, "padding": 1, **kwargs}).requires_grad_(False)
    return conv, fast_conv(conv)


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("added", ["nothing", "residual", "row"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"])
@torch.inference_mode()
def test_the_end_of_a_convolution_on_a_gpu(device, bias, added, relu, monkeypatch):
    """In Triton's interpreter where there is none. A residual may be the same for all images."""
    monkeypatch.setattr("pyvseg.layers.conv.on_gpu", lambda device: True)
    conv, fast = pair(6, 300, bias=bias, stride=2)
    x, residual = image(2, 6, 13, 18), {"nothing": None, "residual": image(2, 300, 7, 9), "row": image(1, 300, 7, 9)}[added]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    conv, fast, x, residual = conv.to(device), fast.to(device), x.to(device), residual if residual is None else residual.to(device)
    expected = conv(x) if residual is None else conv(x) + residual
    found = fast(x, residual=residual, relu=relu)
    assert fast._way(x) == "gpu" and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected.relu() if relu else expected)
    assert torch.equal(fast(x, gelu=True), F.gelu(fast(x)))


@pytest.mark.parametrize("inputs, outputs, way", [
    pytest.param(64, 48, "winograd", marks=needs_kernel),
    pytest.param(33, 65, "winograd", marks=needs_kernel),
    (64, 1, "taps"),
    (70, 2, "taps"),
    (3, 64, "packed"),
    (64, 16, "packed"),
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
        torch.testing.assert_close(fast(x, residual=residual, relu=True).double(), (exact(x.double()) + residual).relu(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("kwargs, way", [
    *(({"kernel_size": 1}, "packed"), ({"stride": 2}, "packed"), ({"padding": 0}, "packed"), ({"padding": 2, "dilation": 2}, "packed")),
    *(({"groups": 2}, None), ({"padding_mode": "reflect"}, None), ({"padding": "same"}, None)),
])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_geometry(kwargs, way, dtype):
    conv, fast = (module.to(dtype) for module in pair(64, 64, **kwargs))
    x = image(1, 64, 12, 12).to(dtype)
    assert fast._way(x) in (way, None if dtype == torch.bfloat16 else way)  # not every processor knows bfloat16
    tolerance = {"rtol": 0, "atol": 5e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    plain = copy.deepcopy(conv).double()
    torch.testing.assert_close(fast(x, relu_input=True).double(), plain(x.double().relu()), **tolerance)
    residual = image(*conv(x).shape).to(dtype)
    want = (plain(x.double()) + residual).relu()
    for given in (residual, residual.contiguous()):
        torch.testing.assert_close(fast(x, residual=given, relu=True).double(), want, **tolerance)


@needs_kernel
def test_wide_bfloat16_is_computed_in_float32():
    conv, fast = (module.to(torch.bfloat16) for module in pair(256, 256))
    x = image(1, 256, 9, 11).to(torch.bfloat16)
    assert fast._way(x) in ("winograd", None)  # not every processor knows bfloat16
    y = fast(x, residual=x, relu=True)
    assert y.dtype == torch.bfloat16
    exact = (copy.deepcopy(conv).double()(x.double()) + x).relu()
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=1e-3)


def test_gradients_take_the_convolution():
    conv, fast = pair(64, 64)
    assert fast._way(image(1, 64, 4, 4)) == "packed"
    assert fast._way(image(1, 64, 16, 16).requires_grad_()) is None
    assert fast._way(image(1, 64, 16, 16).double()) is None


@needs_kernel
def test_reference_backend_takes_no_kernel_of_ours():
    _, fast = pair(64, 64)
    with ops.backend("reference"):
        assert fast._way(image(1, 64, 16, 16)) == "packed"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.float64, 0)])
def test_linear_with_what_follows(dtype, tolerance):
    torch.manual_seed(0)
    plain = nn.Linear(48, 40).to(dtype).requires_grad_(False)
    fast, exact = Linear(plain), copy.deepcopy(plain).double()
    close = lambda y, want: torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=2 * tolerance)
    for x in (torch.randn(2, 7, 48), torch.randn(48, 9).T, torch.randn(48), torch.randn(1, 48).expand(3, -1), torch.randn(0, 48)):
        x = x.to(dtype)
        y = exact(x.double())
        residual = torch.randn(y.shape).to(dtype)
        before = residual.clone()
        close(fast(x), y)
        close(fast(x, relu=True), y.relu())
        close(fast(x, gelu=True), F.gelu(y))
        close(fast(x, residual=residual), y + residual)
        assert torch.equal(residual, before)
    close(copy.deepcopy(fast)(x), y)
    assert fast(torch.ones(2, 48, dtype=dtype, requires_grad=True)).requires_grad


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


def test_packed_for_each_size_of_the_last_few():
    """oneDNN lays the weight out by the size of the input too; of equal layouts one is kept."""
    conv, fast = pair(256, 64, kernel_size=1, padding=0)
    exact = copy.deepcopy(conv).double()
    for batch in (1, 2, 1, 3, 4, 5, 6):
        x = image(batch, 256, 9, 11)
        torch.testing.assert_close(fast(x).double(), exact(x.double()), rtol=0, atol=5e-6)
        layout = torch.ops.mkldnn._get_mkldnn_serialized_md
        assert torch.equal(layout(fast.packed["packed", x.shape]), layout(pack_conv(conv, x.shape)))
        assert len(fast.packed) <= fast.KEPT
    packed = list(fast.packed.values())
    assert len({id(p) for p in packed}) == len({bytes(layout(p).numpy()) for p in packed})
