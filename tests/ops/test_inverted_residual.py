# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg.ops import inverted_residual, inverted_residual_weight
from pyvseg.ops._dispatch import extension, missing

BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(bool(missing("inverted_residual", "cpu")), reason=missing("inverted_residual", "cpu"))),
    "reference",
]
SHAPES = [  # N, I, C, O, kernel, stride, H, W; C = 0: no expansion
    (1, 1, 1, 1, 1, 1, 1, 1),
    (2, 16, 96, 24, 3, 2, 8, 22),
    (1, 24, 144, 24, 5, 1, 7, 11),
    (1, 24, 144, 40, 5, 2, 10, 13),
    (2, 5, 33, 5, 3, 1, 30, 9),
    (1, 32, 0, 16, 3, 1, 6, 19),
    (1, 7, 0, 7, 5, 2, 5, 4),
    (3, 3, 20, 49, 3, 2, 1, 3),
]


def made(N: int, I: int, C: int, O: int, k: int, stride: int, H: int, W: int) -> tuple[Tensor, list]:
    torch.manual_seed(N * I + C * O + H * W)
    middle = C or I
    shapes = ((C, I, 1, 1), (middle, 1, k, k), (O, middle, 1, 1))
    pairs = [(3 * torch.randn(*shape) / shape[1:].numel() ** 0.5, torch.randn(shape[0])) for shape in map(torch.Size, shapes)]
    x = torch.randn(N, I, H, W).contiguous(memory_format=torch.channels_last)
    return x, [pairs[0] if C else None, *pairs[1:]]


def exact(x: Tensor, weights: list, stride: int, residual: bool) -> Tensor:
    """By PyTorch's convolutions and TensorFlow's rule for the padding, in float64."""
    expand, taps, project = ([t.double() for t in pair] if pair else None for pair in weights)
    y = F.relu6(F.conv2d(x.double(), *expand)) if expand else x.double()
    k = taps[0].shape[-1]
    total = [max((-(-size // stride) - 1) * stride + k - size, 0) for size in x.shape[2:]]
    before = (k - stride) // 2
    y = F.pad(y, (before, max(total[1] - before, 0), before, max(total[0] - before, 0)))
    y = F.conv2d(F.relu6(F.conv2d(y, *taps, stride, groups=len(taps[0]))), *project)
    return y + x if residual else y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64_convolutions(shape, backend):
    x, weights = made(*shape)
    stride = shape[5]
    residual = stride == 1 and shape[1] == shape[3]
    got = inverted_residual(x, inverted_residual_weight(*weights), stride=stride, residual=residual, backend=backend)
    want = exact(x, weights, stride, residual)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.skipif(extension is None, reason="extension not built")
@pytest.mark.parametrize("isa", extension.isas() if extension else [])
def test_every_instruction_set(isa):
    before = extension.isa()
    try:
        extension.set_isa(isa)
        for shape in SHAPES:
            test_equals_float64_convolutions(shape, "cpu")
    finally:
        extension.set_isa(before)


@pytest.mark.skipif(extension is None, reason="extension not built")
def test_bands_and_strides_give_the_same():
    """However many threads share the rows, and for slices of batches, channels, rows and columns as for plain tensors."""
    x, weights = made(2, 12, 40, 12, 5, 1, 61, 20)
    weight, threads, results = inverted_residual_weight(*weights), torch.get_num_threads(), []
    whole = torch.randn(3, 20, 70, 30).contiguous(memory_format=torch.channels_last)
    whole[1:, 4:16, 2:63, 3:23] = x
    try:
        for n, form in ((1, x), (2, x), (5, x), (2, whole[1:, 4:16, 2:63, 3:23]), (1, x.contiguous())):
            torch.set_num_threads(n)
            results.append(inverted_residual(form, weight, residual=True, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], each) for each in results[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_nan(backend):
    x, weights = made(1, 4, 8, 4, 3, 1, 9, 9)
    weight = inverted_residual_weight(*weights)
    assert inverted_residual(x[:0], weight, backend=backend).shape == (0, 4, 9, 9)
    x[0, 1, 0, 0] = float("nan")
    y = inverted_residual(x, weight, backend=backend)
    assert y[:, :, :2, :2].isnan().all() and y[:, :, 2:].isfinite().all()


@pytest.mark.skipif(extension is None, reason="extension not built")
def test_opcheck():
    x, weights = made(1, 4, 8, 4, 3, 1, 5, 6)
    torch.library.opcheck(torch.ops.pyvseg.inverted_residual, (x, *inverted_residual_weight(*weights), 1, True))


def test_gradients_come_from_the_reference():
    x, weights = made(1, 4, 8, 6, 3, 2, 6, 6)
    x.requires_grad_()
    upstream = torch.randn(1, 6, 3, 3)
    (got,) = torch.autograd.grad(inverted_residual(x, inverted_residual_weight(*weights), stride=2), x, upstream)
    (want,) = torch.autograd.grad(exact(x, weights, 2, False), x, upstream.double())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(4, 5, 5)}, ValueError, "x must have 4 dimensions"),
        ({"x": torch.zeros(1, 3, 5, 5)}, ValueError, "input channels"),
        ({"x": torch.zeros(1, 4, 5, 5, dtype=torch.bfloat16)}, TypeError, "x must be float32"),
        ({"x": torch.zeros(1, 4, 5, 5, device="meta")}, ValueError, "weight must be float32 on meta"),
        ({"weight": torch.zeros(3)}, TypeError, "inverted_residual_weight"),
        ({"stride": 4}, ValueError, "stride must be 1 to the kernel's 3"),
        ({"residual": True}, ValueError, "residual needs stride 1"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments(change, error, words):
    x, weights = made(1, 4, 8, 6, 3, 1, 5, 5)
    with pytest.raises(error, match=words):
        inverted_residual(**{"x": x, "weight": inverted_residual_weight(*weights), **change})


def test_wrong_weights():
    _, (expand, taps, project) = made(1, 4, 8, 6, 3, 1, 5, 5)
    for wrong in ((project, taps, project), (expand, project, project), (expand, taps, expand), (expand, taps, (project[0], taps[1]))):
        with pytest.raises(ValueError, match="weights must be"):
            inverted_residual_weight(*wrong)
