# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyvseg.ops import kmeans_assign, kmeans_attn, kmeans_pool
from pyvseg.ops._dispatch import missing
from pyvseg.ops.kmeans_attn import _plan, reference, reference_pool
from tests.conftest import shared
from tests.ops.implementations import implementations
from tests.ops.numerics import assert_as_exact

pytestmark = pytest.mark.filterwarnings("error::UserWarning:pyvseg")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # B, C, M, N, D; tiles of positions are 48, 24 or 12, runs 192, blocks of clusters 8 or 4
    (1, 32, 100, 16, 24),
    (2, 33, 53, 37, 20),
    (3, 8, 1, 5, 8),
    (1, 1, 47, 1, 1),
]
LARGE = [(1, 128, 1300, 128, 256), (2, 67, 501, 41, 83), (1, 300, 150, 20, 65)]
every = pytest.mark.parametrize("implementation", implementations("kmeans_attn"), indirect=True)
NAN, INF = float("nan"), float("inf")


def inputs(B: int, C: int, M: int, N: int, D: int, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    pixel = F.normalize(torch.randn(B, C, M), dim=1)
    return pixel.to(dtype), torch.randn(B, N, C).to(dtype), torch.randn(B, D, M).to(dtype)


def affine(N: int) -> dict[str, Tensor]:
    return dict(scale=torch.rand(N) + 0.5, bias=torch.randn(N) * 0.1)


def last(t: Tensor) -> Tensor:
    """The same values with channels adjacent in memory."""
    return t.transpose(1, -1).contiguous().transpose(1, -1)


def logits_of(pixel: Tensor, clusters: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return scale[:, None] * (clusters @ pixel) + bias[:, None]


def assert_assigns(logits: Tensor, assign: Tensor, margin: float = 1e-5) -> None:
    """Every position is at the exact maximum, but for rare pairs closer than the margin; exact (B, N, M) logits."""
    chosen, most = logits.gather(1, assign.long().unsqueeze(1)).squeeze(1), logits.amax(1)
    assert (most - chosen).max() <= margin * logits.abs().max()
    assert (most != chosen).double().mean() <= 0.02


def check(args: tuple[Tensor, Tensor, Tensor], backend: str, layout=lambda t: t) -> None:
    pixel, clusters, value = args
    terms = {name: t.to(pixel.device) for name, t in affine(clusters.shape[1]).items()}
    out = kmeans_attn(layout(pixel), clusters, layout(value), **terms, want_logits=True, backend=backend)
    exact = logits_of(*(t.double() for t in (pixel, clusters, *terms.values())))
    assert_assigns(exact, out.assign)
    same = logits_of(*(t.float() for t in (pixel, clusters)), *terms.values()).to(pixel.dtype)
    assert_as_exact(out.logits, same, exact, "logits")
    N = clusters.shape[1]
    update, count = reference_pool(out.assign, value.double(), N)
    assert_as_exact(out.update, reference_pool(out.assign, value, N)[0], update, "update")
    assert torch.equal(out.count, count.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + LARGE)
@every
def test_forward(implementation, shape, dtype):
    if implementation.slow and (shape in LARGE or dtype == torch.float16):
        shape, dtype = SHAPES[0], dtype
    args = implementation.place(*inputs(*shape, dtype))
    check(args, implementation.backend)
    check(args, implementation.backend, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_is_the_published_formulation(dtype):
    pixel, clusters, value = inputs(2, 16, 90, 12, 20, dtype)
    logits = torch.einsum("bcm,bnc->bnm", pixel, clusters) * 1.3 - 0.2
    one_hot = torch.zeros_like(logits).scatter_(1, logits.max(1, keepdim=True)[1], 1.0)
    update = torch.einsum("bnm,bdm->bnd", one_hot, value)
    out = kmeans_attn(pixel, clusters, value, scale=1.3, bias=-0.2, want_logits=True, backend="reference")
    torch.testing.assert_close(out.update, update, check_dtype=False)
    torch.testing.assert_close(out.logits, logits)
    assert torch.equal(out.assign, one_hot.argmax(1).int()) and torch.equal(out.count, one_hot.sum(2).float())


@every
def test_gradients(implementation):
    for dtype in DTYPES[: 1 if implementation.slow else 3]:
        B, C, M, N, D = (2, 17, 130, 21, 33) if not implementation.slow else (2, 16, 40, 5, 9)
        args = (*inputs(B, C, M, N, D, dtype), *affine(N).values())
        args = implementation.place(*(t.requires_grad_() for t in args))
        assign = kmeans_attn(*args[:3], scale=args[3], bias=args[4], backend=implementation.backend).assign.long()
        grads = [torch.randn(B, N, D, device=assign.device), torch.randn(B, N, M, device=assign.device).to(dtype)]

        def gradients(tensors, backend=None):
            pixel, clusters, value, scale, bias = leaves = [t.detach().requires_grad_() for t in tensors]
            if backend:
                out = kmeans_attn(pixel, clusters, value, scale=scale, bias=bias, want_logits=True, backend=backend)
                outs = out.update, out.logits
            else:
                wide = torch.promote_types(pixel.dtype, torch.float32)
                outs = (
                    reference_pool(assign, value, N)[0],
                    logits_of(pixel.to(wide), clusters.to(wide), scale, bias).to(pixel.dtype),
                )
            return torch.autograd.grad(outs, leaves, [g.to(o.dtype) for g, o in zip(grads, outs)])

        ours, same = gradients(args, implementation.backend), gradients(args)
        exact = gradients([t.double() for t in args])
        for name, *three in zip(("pixel", "clusters", "value"), ours, same, exact):
            assert_as_exact(*three, what=f"gradient of {name}, {dtype}")
        for mine, theirs in zip(ours[3:], exact[3:]):  # sums over positions and channels, taken in another order
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=2e-6 * theirs.abs().max().item())


@every
def test_gradient_only_through_the_sums_without_logits(implementation):
    args = implementation.place(*(t.requires_grad_() for t in inputs(1, 16, 50, 6, 8)))
    out = kmeans_attn(*args, reduction="mean", backend=implementation.backend)
    assert out.logits is None and not out.assign.requires_grad and not out.count.requires_grad
    grad = torch.randn_like(out.update)
    pixel, clusters, value = torch.autograd.grad(out.update, args, grad, allow_unused=True)
    assert pixel is None and clusters is None
    share = grad[0] / out.count[0].clamp(min=1).unsqueeze(-1)
    torch.testing.assert_close(value[0], share[out.assign[0].long()].T)


@every
def test_ties_and_nan_as_argmax(implementation):
    """Equal logits go to the first cluster; NaN is the largest, and the first NaN wins."""
    for N in (6, 21):
        pixel, clusters, value = (t.mul(8).round().clamp(-3, 3) for t in inputs(1, 16, 60, N, 8))  # exact logits
        clusters[:, N // 2 :] = clusters[:, : N - N // 2].clone()  # every logit twice
        pixel[..., 7] = 0  # all equal
        pixel[:, 3, 11], pixel[:, 3, 12], pixel[:, 3, 13], clusters[:, N - 2, 3] = NAN, INF, -INF, 0
        pixel, clusters, value = implementation.place(pixel, clusters, value)
        for bias in (None, torch.where(torch.arange(N) == 4, NAN, 0.0).to(pixel.device)):
            out = kmeans_attn(pixel, clusters, value, bias=bias, want_logits=True, backend=implementation.backend)
            assert torch.equal(out.assign, out.logits.argmax(1).int())
            assert torch.equal(kmeans_assign(out.logits, backend=implementation.backend), out.assign)
            plain = kmeans_attn(pixel, clusters, value, bias=bias, backend="reference")
            assert torch.equal(out.assign, plain.assign)


@every
def test_values_that_are_not_finite_stay_in_their_cluster(implementation):
    pixel, clusters, value = inputs(1, 16, 60, 6, 24)
    value[0, :5, 20], value[0, 17, 21] = NAN, INF
    args = implementation.place(pixel, clusters, value)
    mine, theirs = (kmeans_attn(*args, backend=b) for b in (implementation.backend, "reference"))
    torch.testing.assert_close(mine.update, theirs.update, equal_nan=True)
    assert mine.update.isfinite().all(-1).sum() >= 4


@every
def test_pool_leaves_out_positions_of_no_cluster(implementation):
    value = torch.randn(2, 19, 70)
    assign = torch.randint(-3, 9, (2, 70))
    assign[0, 0], assign[0, 1], assign[1, 5] = 2**40, -(2**31), 2**31 - 1
    value, assign = implementation.place(value, assign)
    for dtype in (torch.int64, torch.int32, torch.int16):
        kind = assign.to(dtype)
        out = kmeans_pool(value.requires_grad_(), kind, 6, backend=implementation.backend)
        one_hot = (kind.unsqueeze(1) == torch.arange(6, device=value.device)[:, None]).float()
        torch.testing.assert_close(out.update, one_hot @ value.mT)
        assert torch.equal(out.count, one_hot.sum(2))
        grad = torch.randn_like(out.update)
        torch.testing.assert_close(torch.autograd.grad(out.update, value, grad)[0], grad.mT @ one_hot)


@every
def test_frames_of_a_clip_share_its_clusters(implementation):
    pixel, clusters, value = implementation.place(*inputs(6, 8, 30, 7, 10))
    pixel, value = pixel.view(6, 8, 5, 6), value.view(6, 10, 5, 6)
    joined = lambda t, B: t.unflatten(0, (B, -1)).transpose(1, 2).flatten(2)  # noqa: E731
    for B in (1, 2):
        centers = clusters[:B]
        out = kmeans_attn(pixel, centers, value, want_logits=True, reduction="mean", backend=implementation.backend)
        long = kmeans_attn(joined(pixel, B), centers, joined(value, B), reduction="mean", backend="reference")
        torch.testing.assert_close(out.update, long.update)
        assert torch.equal(out.count, long.count) and out.logits.shape == (6, 7, 5, 6)
        assert torch.equal(out.assign.view(B, -1), long.assign)
        pool = kmeans_pool(value, out.assign, 7, frames=6 // B, reduction="mean", backend=implementation.backend)
        torch.testing.assert_close(pool.update, out.update)


@every
def test_strided_inputs(implementation):
    pixel, clusters, value = implementation.place(*inputs(2, 24, 120, 9, 40))
    strided = pixel[:, 1:20:2, 10:100:3], clusters[:, ::2, 1:20:2], value[:, 3:30, 10:100:3]
    plain = kmeans_attn(*(t.contiguous() for t in strided), backend=implementation.backend)
    for args in (strided, (last(strided[0])[..., ::2], strided[1].mT.contiguous().mT, last(strided[2])[..., ::2])):
        out = kmeans_attn(*args, backend=implementation.backend)
        assert torch.equal(out.assign, plain.assign[:, :: plain.assign.shape[1] // out.assign.shape[1]])
        torch.testing.assert_close(out.update, reference_pool(out.assign, args[2], 5)[0])


@every
def test_mixed_dtypes(implementation):
    pixel, clusters, value = implementation.place(*inputs(1, 16, 50, 8, 12))
    for value_dtype in (torch.bfloat16, torch.float32):
        for dtype in (torch.float32, torch.bfloat16):
            check((pixel.to(dtype), clusters.to(dtype), value.to(value_dtype)), implementation.backend)


@every
def test_empty(implementation):
    for B, C, M, N, D in ((0, 4, 5, 3, 6), (2, 4, 0, 3, 6), (2, 4, 5, 3, 0), (2, 0, 5, 3, 6)):
        args = implementation.place(*(torch.ones(s) for s in ((B, C, M), (B, N, C), (B, D, M))))
        out = kmeans_attn(*args, want_logits=True, backend=implementation.backend)
        assert out.update.shape == (B, N, D) and out.assign.shape == (B, M) and out.logits.shape == (B, N, M)
        assert kmeans_attn(*args).count.sum() == B * M  # without logits, and where few positions take the reference
        assert out.count.sum() == B * M and (out.update[:, 0] == M).all() and (out.update[:, 1:] == 0).all()
    pool = kmeans_pool(torch.ones(1, 3, 4), torch.zeros(1, 4, dtype=torch.int32), 0)
    assert pool.update.shape == (1, 0, 3) and pool.count.shape == (1, 0)


@every
def test_one_cluster(implementation):
    args = implementation.place(*inputs(2, 8, 500 if not implementation.slow else 30, 1, 20))
    out = kmeans_attn(*args, backend=implementation.backend)
    assert not out.assign.any() and (out.count == args[0].shape[2]).all()
    torch.testing.assert_close(out.update[:, 0], args[2].sum(2))


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    args = inputs(draw(1, 3), draw(1, 70), draw(1, 700), draw(1, 60), draw(1, 140), data.draw(st.sampled_from(DTYPES)))
    check(args, "cpu", data.draw(st.sampled_from([lambda t: t, last])))


def test_the_same_bits_whatever_the_number_of_threads(isa):
    args = inputs(2, 32, 3000, 20, 50)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(kmeans_attn(*args, want_logits=True))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_one_cluster_takes_all(isa):
    """Long sums are taken in parts: one long sum of 200,000 numbers would lose two more digits."""
    value = torch.rand(1, 2, 200_000)
    update = kmeans_pool(value, torch.zeros(1, 200_000, dtype=torch.int32), 2).update
    torch.testing.assert_close(update[0, 0].double(), value[0].double().sum(1), rtol=2e-5, atol=0)


@every
def test_opcheck(implementation):
    pixel, clusters, value = implementation.place(*inputs(2, 16, 30, 5, 6))
    scale, bias = (t.to(pixel.device).requires_grad_() for t in affine(5).values())
    library = torch.ops.pyvseg_triton if implementation.backend == "triton" else torch.ops.pyvseg
    for want in (True, False):
        torch.library.opcheck(library.kmeans_attn.default, (pixel.requires_grad_(), clusters, value.requires_grad_(), scale, bias, want))
    assign = torch.randint(0, 5, (2, 30), dtype=torch.int32, device=pixel.device)
    torch.library.opcheck(library.kmeans_pool.default, (assign, value, 5))
    torch.library.opcheck(library.kmeans_assign.default, (torch.randn(2, 5, 30, device=pixel.device),))
    torch.library.opcheck(library.kmeans_gather.default, (torch.randn(2, 5, 6, device=pixel.device), assign))


def test_compile_and_export():
    args = [t.requires_grad_() for t in inputs(2, 16, 60, 7, 10)]
    terms = affine(7)

    def step(pixel: Tensor, clusters: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out = kmeans_attn(pixel.unflatten(2, (6, 10)), clusters, value.unflatten(2, (6, 10)), **terms, reduction="mean", want_logits=True)
        return out.update * 2, out.logits

    eager, compiled = step(*args), torch.compile(step, fullgraph=True)(*args)
    torch.testing.assert_close(compiled, eager)
    grads = [torch.autograd.grad([o.sum() for o in outs], args) for outs in (eager, compiled)]
    torch.testing.assert_close(*grads)

    class Step(torch.nn.Module):
        def forward(self, pixel: Tensor, clusters: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return step(pixel, clusters, value)

    torch.testing.assert_close(torch.export.export(Step(), tuple(args)).module()(*args), eager)


BAD = {
    r"pixel must be \(B, channels, \*S\)": (ValueError, dict(pixel=torch.zeros(8, 9))),
    "pixel must be float32, bfloat16 or float16, got torch.int64": (TypeError, dict(pixel=torch.zeros(2, 8, 9).long())),
    "value must be a tensor, got list": (TypeError, dict(value=[1])),
    r"value must be \(B, D, \*S\)": (ValueError, dict(value=torch.zeros(2, 6, 8))),
    "value is on meta": (ValueError, dict(value=torch.zeros(2, 6, 9, device="meta"))),
    "clusters must have pixel's dtype": (TypeError, dict(clusters=torch.zeros(2, 4, 8).half())),
    r"clusters must be \(B, N, C=8\)": (ValueError, dict(clusters=torch.zeros(2, 4, 7))),
    "with N > 0": (ValueError, dict(clusters=torch.zeros(2, 0, 8))),
    "pixel must have as many maps as clusters, 3, or a multiple, got 2": (ValueError, dict(clusters=torch.zeros(3, 4, 8))),
    "pixel must have as many maps as clusters, 0, or a multiple, got 2": (ValueError, dict(clusters=torch.zeros(0, 4, 8))),
    "scale must have 1 or N=4 elements": (ValueError, dict(scale=torch.ones(3))),
    "bias must be floating point": (TypeError, dict(bias=torch.ones(4, dtype=torch.int32))),
    'reduction must be "sum" or "mean", got \'max\'': (ValueError, dict(reduction="max")),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments(message):
    error, change = BAD[message]
    args = dict(pixel=torch.zeros(2, 8, 9), clusters=torch.zeros(2, 4, 8), value=torch.zeros(2, 6, 9))
    with pytest.raises(error, match=message):
        kmeans_attn(**(args | change))


def test_wrong_arguments_of_the_parts():
    value, assign = torch.zeros(2, 6, 9), torch.zeros(2, 9, dtype=torch.int32)
    for error, message, call in (
        (ValueError, r"logits must be \(B, N, \*S\)", lambda: kmeans_assign(torch.zeros(2, 0, 9))),
        (TypeError, "logits must be float32", lambda: kmeans_assign(assign)),
        (TypeError, "assign must be a tensor of integers, got torch.float32", lambda: kmeans_pool(value, assign.float(), 3)),
        (ValueError, r"assign must be \(B, \*S\)", lambda: kmeans_pool(value, assign[:, 1:], 3)),
        (ValueError, "assign is on meta", lambda: kmeans_pool(value, assign.to("meta"), 3)),
        (ValueError, "clusters must be in", lambda: kmeans_pool(value, assign, -1)),
        (ValueError, "frames must divide value's 2 maps, got 3", lambda: kmeans_pool(value, assign, 3, frames=3)),
    ):
        with pytest.raises(error, match=message):
            call()


def test_direct_calls_of_the_op_are_checked():
    pixel, clusters, value = inputs(1, 8, 9, 4, 6)
    one = torch.ones(1)
    op = torch.ops.pyvseg.kmeans_attn
    for args in ((pixel, clusters[..., 1:], value, one, one), (pixel, clusters, value[..., 1:], one, one),
                 (pixel, clusters, value, torch.ones(2), one), (pixel, clusters, value, one, one.double()),
                 (pixel, clusters[:, :0], value, one, one), (pixel.double(), clusters.double(), value, one, one)):  # fmt: skip
        with pytest.raises(RuntimeError):
            op(*args, False)
    with pytest.raises(RuntimeError):
        torch.ops.pyvseg.kmeans_gather(torch.zeros(1, 4, 6), torch.zeros(2, 9, dtype=torch.int32))
    with pytest.raises(RuntimeError):
        torch.ops.pyvseg.kmeans_pool(torch.zeros(1, 9, dtype=torch.int64), value, 3)


def test_other_floating_dtypes_take_the_reference():
    args = [t.double() for t in inputs(1, 8, 30, 4, 6)]
    assert kmeans_attn(*args).update.dtype == torch.float64
    assert torch.equal(kmeans_attn(*args).update, reference(*args, torch.ones(1), torch.zeros(1), False)[0])
    with pytest.raises(TypeError, match="backend='cpu'"):
        kmeans_attn(*args, backend="cpu")


def test_published_results(isa):
    from pyvseg.verify import verify_case  # here, as it needs what the GPU machines' tests do without

    report = verify_case(shared("parity", "ops-kmeans_cross_attention"))
    assert report.passed, report
    assert sum(line.verdict == "ok" for line in report.lines) == 35


@pytest.mark.skipif(bool(missing("kmeans_attn", "cpu")), reason="no compiled kernels")
def test_few_positions_of_many_clusters_go_to_pytorch():
    """They do not pay for what the kernel does to the clusters first; whoever asks for the kernel still gets it."""
    pixel, value = (torch.randn(1, 256, 1, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    clusters = torch.randn(1, 256, 256, generator=torch.Generator().manual_seed(2))
    plan = lambda maps, backend: _plan(maps, clusters, maps, None, None, "sum", backend)  # noqa: E731
    assert plan(pixel, "auto") == "reference" and plan(pixel, "cpu") == "cpu" and plan(pixel.repeat(1, 1, 4, 1), "auto") == "cpu"
    found, exact = (kmeans_attn(pixel, clusters, value, backend=backend) for backend in ("auto", "cpu"))
    assert torch.equal(found.assign, exact.assign)
    torch.testing.assert_close(found.update, exact.update)
