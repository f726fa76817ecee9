# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention on CUDA and Triton: real ones on a GPU, elsewhere emulated and interpreted."""

import pytest
import torch
from torch import Tensor

from pyvseg.ops import _dispatch, ms_deform_attn, ms_deform_attn_fused
from pyvseg.ops.ms_deform_attn import reference, reference_fused
from tests.ops.implementations import Implementation, implementations
from tests.ops.numerics import assert_as_exact

ON_GPUS = [each for each in implementations("ms_deform_attn") if each.values[0].isa is None]
on_gpus = pytest.mark.parametrize("implementation", ON_GPUS, indirect=True)
on_cuda = pytest.mark.parametrize("implementation", [each for each in ON_GPUS if "cuda" in each.id], indirect=True)

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
SMALL = [(3, 4), (2, 1)]
CASES = {  # B, Q (None: the queries are the pixels), H, D, P, shapes, dtype of value, of the geometry, reference coordinates
    "usual": (2, 5, 2, 32, 4, SMALL, FLOAT, FLOAT, 2),
    "an encoder's tiles": (1, None, 1, 8, 2, [(5, 10), (1, 9)], BF16, FLOAT, 2),
    "two heads' lanes": (1, 3, 2, 64, 4, SMALL, BF16, BF16, 4),
    "many channels and points": (1, 2, 1, 136, 9, [(4, 3)], HALF, HALF, 4),
    "odd channels, ragged": (2, 3, 3, 5, 3, [(1, 7), (3, 2), (1, 1)], FLOAT, FLOAT, 4),
    "odd channels, narrow": (1, 3, 1, 35, 1, [(0, 4), (2, 2)], HALF, FLOAT, 2),
    "one": (1, 1, 1, 1, 1, [(1, 1)], BF16, BF16, 2),
}


def inputs(B, Q, H, D, P, shapes, dtype=FLOAT, geometry=FLOAT, coordinates=2, form="plain") -> list[Tensor]:
    """Value and geometry; samples lie on the maps and up to a pixel and a half beyond, off the pixels' centres."""
    S, L = sum(h * w for h, w in shapes), len(shapes)
    Q = Q or S
    size = torch.tensor([(max(w, 1), max(h, 1)) for h, w in shapes]).view(L, 1, 2)
    pixel = (torch.rand(B, Q, H, L, P, 2) * (size + 2)).floor() - 2 + 0.1 + 0.8 * torch.rand(B, Q, H, L, P, 2)
    locations = (pixel + 0.5) / size
    value, logits = torch.randn(B, S, H, D).to(dtype), torch.randn(B, Q, H, L, P)
    if form == "plain":
        return [value, locations.to(geometry), logits.flatten(3).softmax(-1).view_as(logits).to(geometry)]
    points = torch.rand(B, Q, L, coordinates) + 0.5
    frame = points[:, :, None, :, None]
    offsets = (locations - frame[..., :2]) * (size if coordinates == 2 else 2 * P / frame[..., 2:])
    return [value, points.to(geometry), offsets.to(geometry), logits.to(geometry)]


def run(function, shapes, tensors: list[Tensor], grad: Tensor, **options) -> list[Tensor]:
    """The output and the gradients of all tensors, on the CPU."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(leaves[0], shapes, *leaves[1:], **options)
    return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, leaves, grad.to(out)))]


FORMS = {"plain": (ms_deform_attn, reference), "fused": (ms_deform_attn_fused, reference_fused)}


@pytest.fixture
def deterministic(request: pytest.FixtureRequest):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@on_gpus
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("case", "deterministic"),
    [(case, False) for case in CASES] + [(case, True) for case in ("usual", "two heads' lanes", "odd channels, narrow")],
    indirect=["deterministic"],
)
def test_forward_and_gradients(implementation, case, form, deterministic):
    shapes = CASES[case][5]
    tensors = inputs(*CASES[case], form=form)
    out = torch.randn(tensors[0].shape[0], tensors[1].shape[1], tensors[0].shape[2] * tensors[0].shape[3]).to(tensors[0].dtype)
    function, definition = FORMS[form]
    ours = run(function, shapes, implementation.place(*tensors), out, backend=implementation.backend)
    same, exact = run(definition, shapes, tensors, out), run(definition, shapes, [t.double() for t in tensors], out)
    for i, three in enumerate(zip(ours, same, exact, strict=True)):
        assert_as_exact(*three, what=f"gradient {i - 1}" if i else "output")


def results(implementation: Implementation, shapes, tensors: list[Tensor], grad: Tensor, deterministic: bool) -> list[Tensor]:
    """As `run`, by the ops themselves."""
    op = "ms_deform_attn" if len(tensors) == 3 else "ms_deform_attn_fused"
    kernels, flat = _dispatch.kernels(implementation.backend), [size for shape in shapes for size in shape]
    value, *geometry, grad = implementation.place(*tensors, grad)
    out = getattr(kernels, op)(value, flat, *geometry)
    return [t.cpu() for t in (out, *getattr(kernels, f"{op}_backward")(grad, value, flat, *geometry, deterministic))]


@on_gpus
def test_locations_that_are_no_numbers_or_far_out_contribute_nothing(implementation):
    shapes = [(3, 4), (2, 1), (1, 3)]
    value, locations, weights = inputs(1, 9, 1, 8, 2, shapes)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e10, -1e10, 2.5, -1.5])
    locations[0, :, 0, :, 0, 0] = locations[0, :, 0, :, 1, 1] = bad[:, None]
    for deterministic in (False, True):
        for t in results(implementation, shapes, [value, locations, weights], torch.ones(1, 9, 8), deterministic):
            assert (t == 0).all()


@on_gpus
def test_bad_numbers_reach_what_depends_on_them(implementation):
    """Logits as in a softmax; a gradient that is not finite makes value's wholly NaN in the deterministic form."""
    tensors = inputs(1, 4, 1, 8, 2, SMALL, form="fused")
    tensors[3][0, 0, 0, 1, 1] = torch.nan
    tensors[3][0, 1, 0, 0, 0] = -torch.inf
    tensors[3][0, 2] = -torch.inf
    out, *_ = results(implementation, SMALL, tensors, torch.ones(1, 4, 8), False)
    torch.testing.assert_close(out, reference_fused(tensors[0], SMALL, *tensors[1:]), equal_nan=True)
    plain = inputs(1, 4, 1, 8, 2, SMALL)
    for bad in (torch.nan, torch.inf):
        grad = torch.ones(1, 4, 8)
        grad[0, 1, 3] = bad
        assert results(implementation, SMALL, plain, grad, True)[1].isnan().all()


@on_gpus
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1e25])
def test_deterministic_sums_do_not_depend_on_the_order(implementation, magnitude):
    """Every query at the same few pixels, then the queries reversed: the same sum, bit by bit, near the exact one."""
    value, locations, weights = inputs(1, 40, 1, 4, 2, [(2, 2)])
    grad = torch.randn(1, 40, 4) * torch.logspace(0, -5, 40)[:, None] * magnitude
    first = results(implementation, [(2, 2)], [value, locations, weights], grad, True)[1]
    again = results(implementation, [(2, 2)], [value, locations.flip(1), weights.flip(1)], grad.flip(1), True)[1]
    assert torch.equal(first, again)
    exact = run(reference, [(2, 2)], [t.double() for t in (value, locations, weights)], grad)[1]
    assert (first - exact).abs().max() <= 2e-6 * exact.abs().max()


@on_gpus
def test_any_memory_layout(implementation):
    """Strided, expanded and unaligned tensors."""
    tensors = inputs(2, 2, 2, 8, 2, SMALL, form="fused")
    grad = torch.randn(1, 1, 16).expand(2, 2, 16)

    def shifted(t: Tensor) -> Tensor:  # off by one number from any alignment
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    expected = results(implementation, SMALL, tensors, grad.contiguous(), True)
    for change in (shifted, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)):
        for one, two in zip(results(implementation, SMALL, [change(t) for t in tensors], change(grad), True), expected, strict=True):
            assert torch.equal(one, two)
    for one, two in zip(results(implementation, SMALL, tensors, grad, True), expected, strict=True):
        assert torch.equal(one, two)


@on_gpus
def test_reference_may_be_wider_than_the_rest(implementation):
    value, points, offsets, logits = inputs(1, 4, 1, 8, 2, SMALL, BF16, BF16, 4, form="fused")
    tensors = [value, points.float() + 1e-3, offsets, logits]
    ours = results(implementation, SMALL, tensors, torch.ones(1, 4, 8, dtype=BF16), False)
    assert [t.dtype for t in ours] == [BF16, BF16, FLOAT, BF16, BF16]
    exact = run(reference_fused, SMALL, [t.double() for t in tensors], torch.ones(1, 4, 8))
    for mine, theirs, tolerance in zip(ours, exact, (1e-2, 1e-2, 1e-4, 1e-2, 1e-2), strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


@on_gpus
@pytest.mark.parametrize("sizes", [(0, 3, 2, 8, 2), (1, 0, 2, 8, 2), (1, 3, 0, 8, 2), (1, 3, 2, 0, 2), (1, 3, 2, 8, 0)])
def test_empty(implementation, sizes):
    B, Q, H, D, P = sizes
    value, locations, weights = torch.randn(B, 14, H, D), torch.rand(B, Q, H, 2, P, 2), torch.rand(B, Q, H, 2, P)
    for deterministic in (False, True):
        ours = results(implementation, SMALL, [value, locations, weights], torch.randn(B, Q, H * D), deterministic)
        assert [t.shape for t in ours] == [(B, Q, H * D), value.shape, locations.shape, weights.shape]
        assert all((t == 0).all() for t in ours)


@on_cuda
def test_too_many_levels_are_refused(implementation):
    shapes = [(1, 1)] * 17
    tensors = inputs(1, 2, 1, 8, 1, shapes)
    with pytest.raises(RuntimeError, match="at most 16 levels, got 17"):
        results(implementation, shapes, tensors, torch.ones(1, 2, 8), False)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [each for each in ON_GPUS if each.values[0].device == "cuda"], indirect=True)
def test_graph_capture(implementation):
    """Forward and backward wait for nothing on the host: a CUDA graph replays them on new numbers."""
    shapes, flat = [(12, 20), (6, 10)], [12, 20, 6, 10]
    kernels = _dispatch.kernels(implementation.backend)
    tensors = implementation.place(*inputs(1, None, 8, 32, 4, shapes, BF16, form="fused"))
    grad = torch.randn(1, 300, 256, device="cuda").to(BF16)

    def step() -> list[Tensor]:
        value, *geometry = tensors
        out = kernels.ms_deform_attn_fused(value, flat, *geometry)
        return [out, *kernels.ms_deform_attn_fused_backward(grad, value, flat, *geometry, True)]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    tensors[0].normal_()
    graph.replay()
    torch.cuda.synchronize()
    for one, two in zip(captured, step(), strict=True):
        assert torch.equal(one, two)
