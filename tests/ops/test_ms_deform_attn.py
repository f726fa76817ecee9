# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyvseg.ops import ms_deform_attn, ms_deform_attn_fused
from pyvseg.ops.ms_deform_attn import reference, reference_fused
from tests.ops.implementations import implementations
from tests.ops.numerics import assert_as_exact

pytestmark = pytest.mark.filterwarnings("error::UserWarning:pyvseg")
PYRAMID = [(3, 4), (6, 7), (11, 13)]
CASES = {  # B, Q, H, D, P, shapes, reference width of the fused form
    "pixel decoder": (2, 63, 8, 32, 4, PYRAMID, 2),
    "few queries": (1, 3, 4, 32, 4, [(40, 30), (20, 15)], 4),
    "ragged": (1, 40, 3, 5, 3, [(1, 7), (9, 2), (4, 1), (2, 5)], 4),
    "one sample": (3, 20, 1, 1, 1, [(2, 2)], 2),
    "wide": (1, 30, 2, 100, 5, [(5, 6), (3, 3)], 2),
    "many samples": (1, 24, 2, 64, 9, PYRAMID, 4),
    "a level without pixels": (1, 19, 2, 16, 2, [(3, 3), (0, 5), (2, 2)], 2),
}
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
MARGIN = 0.02  # of a pixel: how far test samples stay from where the gradient of a location jumps


def sizes_of(shapes: list[tuple[int, int]]) -> Tensor:
    """(L, 1, 2) widths and heights, at least one."""
    return torch.tensor([(max(w, 1), max(h, 1)) for h, w in shapes], dtype=torch.int64).view(-1, 1, 2)


def smooth(locations: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """The locations, moved out of the bands around pixel centres."""
    sizes = sizes_of(shapes).double()
    pixel = locations.double() * sizes - 0.5
    low = pixel.floor()
    return ((low + (pixel - low).clamp(MARGIN, 1 - MARGIN) + 0.5) / sizes).to(locations.dtype)


def plain(B, Q, H, D, P, shapes, width=2, dtypes=DTYPES[0], spread=1.3) -> list[Tensor]:
    """Value, locations (most on the map, some at its border and beyond), weights."""
    L, S = len(shapes), sum(h * w for h, w in shapes)
    locations = smooth((torch.rand(B, Q, H, L, P, 2) - 0.5) * spread + 0.5, shapes)
    weights = torch.randn(B, Q, H, L * P).softmax(-1).view(B, Q, H, L, P)
    return [torch.randn(B, S, H, D).to(dtypes[0]), locations.to(dtypes[1]), weights.to(dtypes[1])]


def fused(B, Q, H, D, P, shapes, width=2, dtypes=DTYPES[0]) -> list[Tensor]:
    """Value, reference points or boxes, offsets, logits; the reference always float32."""
    L, S = len(shapes), sum(h * w for h, w in shapes)
    points = torch.rand(B, Q, L, width) if width == 2 else torch.cat([torch.rand(B, Q, L, 2), torch.rand(B, Q, L, 2) * 0.8 + 0.1], -1)
    sizes = sizes_of(shapes)
    frame = points[:, :, None, :, None]
    scale = 1 / sizes if width == 2 else frame[..., 2:] * 0.5 / P
    offsets = (torch.randn(B, Q, H, L, P, 2) * (2 if width == 2 else P)).to(dtypes[1]).float()
    if dtypes[1] == torch.float32:
        offsets = (smooth(frame[..., :2] + offsets * scale, shapes) - frame[..., :2]) / scale
    return [torch.randn(B, S, H, D).to(dtypes[0]), points, offsets.to(dtypes[1]), torch.randn(B, Q, H, L, P).to(dtypes[1])]


FORMS = {"plain": (plain, ms_deform_attn, reference), "fused": (fused, ms_deform_attn_fused, reference_fused)}


def results(function, shapes, tensors: list[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    """The output and, with a `grad`, the gradients of all tensors."""
    if grad is None:
        return [function(tensors[0], shapes, *tensors[1:])]
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(leaves[0], shapes, *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out))]


def assert_as_reference(ours: list[Tensor], tensors: list[Tensor], shapes, form: str, grad: Tensor | None = None) -> None:
    definition = FORMS[form][2]
    same = results(definition, shapes, tensors, grad)
    exact = results(definition, shapes, [t.double() for t in tensors], grad)
    names = ["output", *(f"gradient {i}" for i in range(len(tensors)))]
    for name, *three in zip(names, [t.cpu() for t in ours], same, exact):
        assert_as_exact(*three, what=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", implementations("ms_deform_attn"), indirect=True)
def test_forward_and_gradients(implementation, case, form):
    B, Q, H, D, P, shapes, width = CASES[case]
    if implementation.slow:
        B, Q, H, D = 1, min(Q, 5), min(H, 2), min(D, 16)
    make, function, _ = FORMS[form]
    tensors = make(B, Q, H, D, P, shapes, width)
    grad = torch.randn(B, Q, H * D)
    run = lambda *t: function(*t, backend=implementation.backend)  # noqa: E731
    ours = results(run, shapes, list(implementation.place(*tensors)), *implementation.place(grad))
    assert_as_reference(ours, tensors, shapes, form, grad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=str)
@pytest.mark.parametrize("implementation", implementations("ms_deform_attn"), indirect=True)
def test_narrow_dtypes(implementation, dtypes, form):
    """Gradients of locations are compared where both dtypes are the same: float64 sees the same rounded locations."""
    make, function, _ = FORMS[form]
    for H, D in [(2, 16)] if implementation.slow else [(4, 32), (1, 7)]:
        tensors = make(2, 21, H, D, 3, PYRAMID, 2, dtypes)
        grad = torch.randn(2, 21, H * D).to(dtypes[0])
        run = lambda *t: function(*t, backend=implementation.backend)  # noqa: E731
        ours = results(run, PYRAMID, list(implementation.place(*tensors)), *implementation.place(grad))
        assert_as_reference(ours, tensors, PYRAMID, form, grad)


@settings(max_examples=50)
@given(data=st.data())
def test_any_shape(data):
    """Sizes, not precision: single numbers may well err by more than twice another's error."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    shapes = [(draw(0, 9), draw(1, 9)) for _ in range(draw(0, 3))] + [(draw(1, 9), draw(1, 9))]
    sizes = draw(1, 3), draw(1, 90), draw(1, 5), draw(1, 70), draw(1, 6)
    form, dtypes = data.draw(st.sampled_from(sorted(FORMS))), data.draw(st.sampled_from(DTYPES))
    make, function, _ = FORMS[form]
    tensors = make(*sizes, shapes, data.draw(st.sampled_from((2, 4))), dtypes)
    grad = torch.randn(sizes[0], sizes[1], sizes[2] * sizes[3]).to(dtypes[0])
    exact = results(FORMS[form][2], shapes, [t.double() for t in tensors], grad)
    for mine, theirs in zip(results(function, shapes, tensors, grad), exact):
        worst = 16 * torch.finfo(mine.dtype).eps * (1 + theirs.abs().max())
        assert (mine.double() - theirs).abs().max() < max(worst, 1e-4)


def test_definition_by_hand():
    """One pixel of value 1 at (x=1, y=0) of a map 3 wide and 2 high, sampled along a line."""
    value = torch.zeros(1, 6, 1, 1)
    value[0, 1] = 1
    x = torch.tensor([1.5, 1.25, 0.5, 2.0, -9.0]) / 3  # the pixel's centre lies at 1.5 / 3
    locations = torch.stack((x, torch.full((5,), 0.5 / 2)), -1).view(1, 5, 1, 1, 1, 2)
    for backend in ("auto", "reference"):
        out = ms_deform_attn(value, [(2, 3)], locations, torch.full((1, 5, 1, 1, 1), 2.0), backend=backend)
        torch.testing.assert_close(out.flatten(), torch.tensor([2.0, 1.5, 0.0, 1.0, 0.0]))


def test_fused_is_plain_of_its_locations(isa):
    value, points, offsets, logits = fused(2, 30, 4, 32, 4, PYRAMID)
    sizes = sizes_of(PYRAMID)
    locations, weights = points[:, :, None, :, None] + offsets / sizes, logits.flatten(3).softmax(-1).view_as(logits)
    torch.testing.assert_close(
        ms_deform_attn_fused(value, PYRAMID, points, offsets, logits), ms_deform_attn(value, PYRAMID, locations, weights), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("queries", [2, 200])  # in place, and by way of the padded copy
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38, -1e30])
def test_locations_that_are_no_numbers_contribute_nothing(isa, bad, queries):
    value, locations, weights = plain(1, queries, 2, 24, 3, PYRAMID)
    strange = locations.clone()
    strange[:, ::2, 0, 1, 1, 0] = bad
    strange[:, 1::2, 1, 2, 0, 1] = bad
    outside = torch.where(strange == locations, locations, -5.0)
    grad = torch.randn(1, queries, 48)
    ours = results(ms_deform_attn, PYRAMID, [value, strange, weights], grad)
    for mine, theirs in zip(ours, results(ms_deform_attn, PYRAMID, [value, outside, weights], grad)):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(ours, results(reference, PYRAMID, [value, strange, weights], grad)):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert (ours[2][strange != locations] == 0).all()


@pytest.mark.parametrize("queries", [2, 200])
@pytest.mark.parametrize("where", ["value", "weights", "logits"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_other_bad_numbers_stay_where_they_are(isa, where, bad, queries):
    """They reach what depends on them, as in the reference, and nothing else."""
    if where == "logits":
        tensors, (function, definition) = fused(1, queries, 2, 16, 3, PYRAMID), FORMS["fused"][1:]
        tensors[3][0, 0, 1, 2, 0] = bad
    else:
        tensors, (function, definition) = plain(1, queries, 2, 16, 3, PYRAMID), FORMS["plain"][1:]
        tensors[0 if where == "value" else 2][0, 1, 1].flatten()[:3] = bad
    mine, theirs = (f(tensors[0], PYRAMID, *tensors[1:]) for f in (function, definition))
    assert torch.equal(mine.isfinite(), theirs.isfinite())
    torch.testing.assert_close(mine[mine.isfinite()], theirs[mine.isfinite()], rtol=1e-4, atol=1e-4)
    results(function, PYRAMID, tensors, torch.ones_like(mine))  # must come back, whatever the values


@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs(isa, form):
    make, function, _ = FORMS[form]
    tensors = make(2, 50, 3, 20, 3, PYRAMID)
    grad = torch.randn(2, 50, 60)
    strided = [torch.stack((t, t.flip(0)), 1)[:, 0] for t in tensors]  # rows far apart
    strided[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    strided[-1] = tensors[-1].transpose(1, 4).contiguous().transpose(1, 4)
    assert not any(t.is_contiguous() for t in strided)
    expected = results(function, PYRAMID, tensors, grad)
    for mine, theirs in zip(results(function, PYRAMID, strided, grad), expected):
        assert torch.equal(mine, theirs)
    broadcast = [tensors[0], *(t[:, :1].expand_as(t) for t in tensors[1:])]
    same = function(broadcast[0], PYRAMID, *(t.contiguous() for t in broadcast[1:]))
    assert torch.equal(function(broadcast[0], PYRAMID, *broadcast[1:]), same)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(1, 700, 2, 40, 4), (1, 30, 1, 32, 4)])
def test_any_number_of_threads_gives_the_same_bits(form, sizes):
    make, function, _ = FORMS[form]
    tensors = make(*sizes, PYRAMID, 4)
    grad = torch.randn(sizes[0], sizes[1], sizes[2] * sizes[3])

    def run(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return results(function, PYRAMID, tensors, grad)
        finally:
            torch.set_num_threads(before)

    first = run(2)
    for threads in (2, 1, 3, 7):
        assert all(torch.equal(a, b) for a, b in zip(first, run(threads)))


@pytest.mark.parametrize("empty", ["B", "Q", "H", "D", "P", "L", "S"])
@pytest.mark.parametrize("form", FORMS)
def test_empty_inputs(empty, form):
    sizes = {name: 0 if name == empty else size for name, size in dict(B=2, Q=5, H=3, D=8, P=2).items()}
    shapes = {"L": [], "S": [(0, 3), (2, 0)]}.get(empty, [(2, 3), (1, 4)])
    leaves = [t.requires_grad_() for t in FORMS[form][0](*sizes.values(), shapes)]
    out = FORMS[form][1](leaves[0], shapes, *leaves[1:])
    assert out.shape == (sizes["B"], sizes["Q"], sizes["H"] * sizes["D"]) and (out == 0).all()
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert grad.shape == leaf.shape and (grad == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    make, function, _ = FORMS[form]
    value, *geometry = [t.requires_grad_() for t in make(2, 9, 2, 8, 2, PYRAMID)]
    flat = list(itertools.chain(*PYRAMID))
    torch.library.opcheck(getattr(torch.ops.pyvseg, function.__name__).default, (value, flat, *geometry))
    value, *geometry = [t.detach() for t in (value, *geometry)]
    backward = getattr(torch.ops.pyvseg, f"{function.__name__}_backward").default
    torch.library.opcheck(backward, (torch.randn(2, 9, 16), value, flat, *geometry, True))


def test_gradcheck_of_the_reference():
    for form, width in (("plain", 2), ("fused", 2), ("fused", 4)):
        value, *geometry = [t.double().requires_grad_() for t in FORMS[form][0](1, 3, 2, 2, 2, [(2, 3), (3, 1)], width)]
        assert torch.autograd.gradcheck(lambda v, *g, form=form: FORMS[form][2](v, [(2, 3), (3, 1)], *g), (value, *geometry))


@pytest.mark.parametrize("form", FORMS)
def test_compile_and_export(form):
    make, function, _ = FORMS[form]
    tensors = make(1, 12, 2, 16, 2, PYRAMID)

    class Attention(torch.nn.Module):
        def forward(self, value: Tensor, *geometry: Tensor) -> Tensor:
            return function(value, PYRAMID, *geometry)

    eager = results(lambda v, _, *g: Attention()(v, *g), PYRAMID, tensors, torch.ones(1, 12, 32))
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(results(lambda v, _, *g: compiled(v, *g), PYRAMID, tensors, torch.ones(1, 12, 32)), eager):
        torch.testing.assert_close(mine, theirs)
    exported = torch.export.export(Attention(), tuple(tensors))
    assert torch.equal(exported.module()(*tensors), eager[0])


def test_shapes_as_a_tensor():
    value, locations, weights = plain(1, 12, 2, 16, 2, PYRAMID)
    assert torch.equal(ms_deform_attn(value, torch.tensor(PYRAMID), locations, weights), ms_deform_attn(value, PYRAMID, locations, weights))


def test_dtypes_that_kernels_do_not_take():
    value, locations, weights = plain(1, 12, 2, 16, 2, PYRAMID)
    wide = ms_deform_attn(value.double(), PYRAMID, locations, weights)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(ms_deform_attn(value, PYRAMID, locations.bfloat16().float(), weights.half().float()),
                               ms_deform_attn(value, PYRAMID, locations.bfloat16(), weights.half()))  # fmt: skip
    with pytest.raises(TypeError, match="backend='cpu'"):
        ms_deform_attn(value.double(), PYRAMID, locations, weights, backend="cpu")


Z = torch.zeros
BAD = {
    r"value must be \(B, S, H, D\)": (ValueError, dict(value=Z(14, 2, 8))),
    "value must be a tensor": (TypeError, dict(value=[1.0])),
    "value must be floating point, got torch.int64": (TypeError, dict(value=Z(1, 14, 2, 8).long())),
    "have 14 pixels but value .* has S=15": (ValueError, dict(value=Z(1, 15, 2, 8))),
    "spatial_shapes must be L pairs": (ValueError, dict(spatial_shapes=[2, 3])),
    "spatial_shapes must be integers, got torch.float32": (TypeError, dict(spatial_shapes=Z(2, 2))),
    r"spatial_shapes must be integers, got \[\(2.0": (TypeError, dict(spatial_shapes=[(2.0, 3), (4, 2)])),
    "spatial_shapes must lie in": (ValueError, dict(spatial_shapes=[(-2, -3), (4, 2)])),
    r"attention_weights must be \(B=1, Q, H=2, L=2, P\)": (ValueError, dict(attention_weights=Z(1, 5, 2, 3, 4))),
    r"sampling_locations must be \(B=1, Q=5, H=2, L=2, P=4, 2\)": (ValueError, dict(sampling_locations=Z(1, 5, 2, 2, 3, 2))),
    "sampling_locations must be floating point": (TypeError, dict(sampling_locations=Z(1, 5, 2, 2, 4, 2).int())),
    "attention_weights is on meta but value on cpu": (ValueError, dict(attention_weights=Z(1, 5, 2, 2, 4, device="meta"))),
    "backend must be one of": (ValueError, dict(backend="gpu")),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments(message):
    error, change = BAD[message]
    shapes = [(2, 3), (4, 2)]
    args = dict(value=Z(1, 14, 2, 8), spatial_shapes=shapes, sampling_locations=Z(1, 5, 2, 2, 4, 2), attention_weights=Z(1, 5, 2, 2, 4))
    with pytest.raises(error, match=message):
        ms_deform_attn(**(args | change))


def test_wrong_reference_points():
    with pytest.raises(ValueError, match=r"reference_points must be \(B=1, Q=5, L=1, 2 or 4\)"):
        ms_deform_attn_fused(Z(1, 6, 2, 8), [(2, 3)], Z(1, 5, 1, 3), Z(1, 5, 2, 1, 4, 2), Z(1, 5, 2, 1, 4))


def test_direct_calls_of_the_op_are_checked():
    value, locations, weights = plain(1, 12, 2, 16, 2, PYRAMID)
    op, backward = torch.ops.pyvseg.ms_deform_attn, torch.ops.pyvseg.ms_deform_attn_backward
    flat = list(itertools.chain(*PYRAMID))
    for args in (
        (value, flat[:-1], locations, weights),
        (value, [*flat[:-1], 14], locations, weights),
        (value, [-3, -4, *flat[2:]], locations, weights),
        (value, flat, locations[..., :1], weights),
        (value, flat, locations, weights[:, :5]),
        (value, flat, locations.double(), weights.double()),
        (value, flat, locations.bfloat16(), weights),
    ):
        with pytest.raises(RuntimeError, match="ms_deform_attn|need float32"):
            op(*args)
    with pytest.raises(RuntimeError, match="grad must be"):
        backward(torch.zeros(1, 12, 31), value, flat, locations, weights, False)
