# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyvseg.ops as ops
from pyvseg.ops import Conv3x3Weight, conv3x3, conv3x3_weight
from pyvseg.ops._dispatch import extension, missing
from pyvseg.ops.conv3x3 import A_T, B_T, G

BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(bool(missing("conv3x3", "cpu")), reason=missing("conv3x3", "cpu"))),
    "reference",
]
SHAPES = [  # N, I, O, H, W
    (1, 1, 1, 1, 1),
    (1, 16, 32, 2, 3),
    (2, 3, 5, 4, 4),
    (1, 17, 33, 5, 5),
    (3, 20, 37, 1, 13),
    (2, 15, 64, 9, 6),
    (1, 48, 31, 12, 17),
    (7, 33, 40, 7, 8),
    (2, 64, 96, 30, 54),
]


def inputs(N: int, I: int, O: int, H: int, W: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(N * I + O * H + W)
    x, residual = (torch.randn(N, C, H, W).contiguous(memory_format=torch.channels_last) for C in (I, O))
    return x, torch.randn(O, I, 3, 3) / (3 * I**0.5), torch.randn(O), residual


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)


def assert_rounding_only(got: Tensor, want: Tensor, x: Tensor, weight: Tensor) -> None:
    """Errors of a few roundings of the largest sum of magnitudes that an output is made of."""
    size = exact(x.abs(), weight.abs()).max().item() + 1
    assert got.shape == want.shape and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=16 * torch.finfo(torch.float32).eps * size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64_convolution(shape, backend):
    x, weight, bias, residual = inputs(*shape)
    prepared = conv3x3_weight(weight)
    assert_rounding_only(conv3x3(x, prepared, backend=backend), exact(x, weight), x, weight)
    got = conv3x3(x, prepared, bias, relu_input=True, residual=residual, backend=backend)
    assert_rounding_only(got, exact(x.relu(), weight, bias) + residual, x, weight)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 24, 40, 45, 18), (2, 33, 65, 9, 6)])
def test_bfloat16_rounds_only_the_result(shape, backend):
    x, weight, bias, residual = inputs(*shape)
    x, residual, prepared = x.bfloat16(), residual.bfloat16(), conv3x3_weight(weight)
    got = conv3x3(x, prepared, bias, relu_input=True, residual=residual, backend=backend)
    want = exact(x.relu(), weight, bias) + residual
    assert got.dtype == torch.bfloat16 and got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), want, rtol=2**-8 * 1.01, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("inputs_", [64, 256, 512])
def test_error_is_within_a_few_direct_convolutions(inputs_, relu, backend):
    """Root mean square over many outputs, against PyTorch's most accurate float32 form. The points 0, +-1, +-2 fail this,
    as does adding up all channels in one sum, which a GEMM of the reference does."""
    x, weight, _, _ = inputs(1, inputs_, 64, 31, 54)
    x = x.relu() if relu else x
    want = exact(x, weight)
    ours, direct = ((y - want).square().mean().sqrt() for y in (
        conv3x3(x, conv3x3_weight(weight), backend=backend), F.conv2d(x.contiguous(), weight, padding=1)
    ))
    assert ours <= (5 if backend == "cpu" else 10) * direct


def test_transforms_are_exact():
    """In rational arithmetic the three matrices make a 1-D convolution of 4 outputs and 3 taps: checked on all unit vectors."""
    b_t, g, a_t = (torch.tensor(m, dtype=torch.float64) for m in (B_T, G, A_T))
    got = torch.einsum("yk,kt,ki->yti", a_t, g, b_t)
    want = torch.tensor([[[float(i == y + t) for i in range(6)] for t in range(3)] for y in range(4)], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """Slices of channels, rows and batches, an expanded residual and plain contiguous tensors."""
    whole, weight, bias, _ = inputs(3, 40, 35, 11, 14)
    x = whole[1:, 8:28, 1:10, 2:13]
    weight = weight[:, :20]
    residual = torch.randn(1, 35, 9, 11).contiguous(memory_format=torch.channels_last).expand(2, -1, -1, -1)
    want = exact(x, weight, bias) + residual
    for form in (lambda t: t, Tensor.contiguous):
        got = conv3x3(form(x), conv3x3_weight(weight), bias, residual=form(residual), backend=backend)
        assert_rounding_only(got, want, x, weight)
    every_other = torch.stack([bias, bias], dim=1)[:, 0]
    got = conv3x3(x, conv3x3_weight(weight), every_other, residual=residual, backend=backend)
    assert_rounding_only(got, want, x, weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    _, weight, bias, _ = inputs(1, 5, 6, 4, 4)
    for N, H, W in ((0, 4, 4), (2, 0, 4), (2, 4, 0)):
        assert conv3x3(torch.zeros(N, 5, H, W), conv3x3_weight(weight), bias, backend=backend).shape == (N, 6, H, W)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_goes_through_the_activation(backend):
    x, weight, _, _ = inputs(1, 4, 3, 12, 12)
    x[0, 2, 1, 1] = float("nan")
    y = conv3x3(x, conv3x3_weight(weight), relu_input=True, backend=backend)
    assert y[:, :, :3, :3].isnan().all() and y[:, :, 8:, 8:].isfinite().all()


@pytest.mark.skipif(extension is None, reason="extension not built")
@pytest.mark.parametrize("shape", [(2, 130, 70, 50, 61), (1, 24, 45, 89, 130)])
def test_many_blocks_and_threads_give_the_same(shape):
    """More tiles than a block holds, and results that do not depend on how threads share the work: blocks of all, or of each."""
    x, weight, bias, residual = inputs(*shape)
    prepared, threads = conv3x3_weight(weight), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(conv3x3(x, prepared, bias, residual=residual, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert_rounding_only(results[0], exact(x, weight, bias) + residual, x, weight)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.skipif(extension is None, reason="extension not built")
@pytest.mark.parametrize("isa", extension.isas() if extension else [])
def test_every_instruction_set(isa):
    before = extension.isa()
    try:
        extension.set_isa(isa)
        for shape in SHAPES:
            test_equals_float64_convolution(shape, "cpu")
        test_bfloat16_rounds_only_the_result((2, 33, 65, 9, 6), "cpu")
    finally:
        extension.set_isa(before)


@pytest.mark.skipif(extension is None, reason="extension not built")
def test_instruction_set_from_the_environment():
    code = "import pyvseg.ops, torch; from pyvseg.ops import *; from pyvseg import _C; " \
        "y = conv3x3(torch.ones(1, 2, 6, 6), conv3x3_weight(torch.ones(1, 2, 3, 3)), backend='cpu'); print(_C.isa(), round(y[0, 0, 2, 2].item(), 3))"
    out = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYVSEG_ISA": "baseline"}, capture_output=True, text=True)
    assert out.stdout.split() == ["baseline", "18.0"], out.stderr


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_come_from_the_reference(backend):
    x, weight, bias, residual = (t.requires_grad_() for t in inputs(2, 5, 6, 6, 9))
    upstream = torch.randn(2, 6, 6, 9)
    got = torch.autograd.grad(conv3x3(x, conv3x3_weight(weight), bias, relu_input=True, residual=residual, backend=backend),
                              (x, weight, bias, residual), upstream)
    want = torch.autograd.grad(exact(x.relu(), weight, bias) + residual, (x, weight, bias, residual), upstream.double())
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(extension is None, reason="extension not built")
def test_opcheck():
    x, weight, bias, residual = inputs(2, 5, 6, 6, 9)
    torch.library.opcheck(torch.ops.pyvseg.conv3x3, (x, *conv3x3_weight(weight), bias, residual, True))
    torch.library.opcheck(torch.ops.pyvseg.conv3x3, (x.contiguous(), *conv3x3_weight(weight), None, None, False))


def test_backend_reference_is_used(monkeypatch):
    x, weight, _, _ = inputs(1, 4, 3, 5, 5)
    called = []
    monkeypatch.setattr(sys.modules["pyvseg.ops.conv3x3"], "reference", lambda *args: called.append(args) or x)
    with ops.backend("reference"):
        conv3x3(x, conv3x3_weight(weight))
    assert called


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.zeros(5, 4, 4)}, ValueError, "x must have 4 dimensions"),
        ({"x": torch.zeros(1, 6, 4, 4)}, ValueError, "5 input channels"),
        ({"x": torch.zeros(1, 5, 4, 4, dtype=torch.float64)}, TypeError, "x must be float32"),
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"weight": torch.zeros(6, 5, 3, 3)}, TypeError, "conv3x3_weight"),
        ({"bias": torch.zeros(5)}, ValueError, "6 output channels"),
        ({"bias": torch.zeros(6, 1)}, ValueError, "bias must have 1 dimension"),
        ({"residual": torch.zeros(1, 6, 4, 5)}, ValueError, r"\(1, 6, 4, 4\)"),
        ({"residual": torch.zeros(1, 6, 4, 4, dtype=torch.bfloat16)}, TypeError, "residual must be float32"),
        ({"x": torch.zeros(1, 5, 4, 4, device="meta")}, ValueError, "weight is on cpu but x on meta"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments(change, error, words):
    arguments = {"x": torch.zeros(1, 5, 4, 4), "weight": conv3x3_weight(torch.zeros(6, 5, 3, 3)), **change}
    with pytest.raises(error, match=words):
        conv3x3(**arguments)


@pytest.mark.parametrize("weight, error", [
    (torch.zeros(4, 4, 3, 3, dtype=torch.int64), TypeError),
    (torch.zeros(4, 4, 1, 1), ValueError),
    (torch.zeros(4, 4, 3), ValueError),
    (torch.zeros(0, 4, 3, 3), ValueError),
])
def test_wrong_weight(weight, error):
    with pytest.raises(error, match="weight must be"):
        conv3x3_weight(weight)


def test_weight_layout():
    weight = torch.randn(40, 3, 3, 3)
    tiles, outputs = conv3x3_weight(weight)
    g = torch.tensor(G, dtype=torch.float64)
    assert isinstance(conv3x3_weight(weight), Conv3x3Weight) and tiles.shape == (2, 36, 3, 32) and outputs == 40
    torch.testing.assert_close(tiles[1, 8, 2, 5], (g[1] @ weight[37, 2].double() @ g[2]).float())
    assert not tiles[1, :, :, 8:].any()
