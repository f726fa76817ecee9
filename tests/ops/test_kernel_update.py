# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyvseg.ops import KernelUpdator, kernel_update, mask_pool
from pyvseg.ops.kernel_update import reference_update
from tests.ops.implementations import implementations
from tests.ops.numerics import assert_as_exact

pytestmark = pytest.mark.filterwarnings("error::UserWarning:pyvseg")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POOLS = implementations("mask_pool")
UPDATES = implementations("kernel_update")


def inputs(B: int, N: int, C: int, size: tuple[int, ...], density: float, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Mask logits of which a share `density` is on, and features."""
    return (torch.rand(B, N, *size) - (1 - density)).to(dtype), torch.randn(B, C, *size).to(dtype)


def pool_of(masks: Tensor, features: Tensor) -> Tensor:
    """The published form with the threshold at a logit of zero, in the features' dtype (at least float32)."""
    wide = torch.promote_types(features.dtype, torch.float32)
    return torch.einsum("bnp,bcp->bnc", (masks > 0).to(wide).flatten(2), features.to(wide).flatten(2))


def gradients(out: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, leaves, grad.to(out.dtype)))


def assert_pools(implementation, masks: Tensor, features: Tensor) -> None:
    """Forward and backward, in the layout that the features have."""
    exact = features.detach().double().requires_grad_()
    plain = features.detach().clone().requires_grad_()
    masks_there, leaf = implementation.place(masks, features.requires_grad_())
    ours = mask_pool(masks_there, leaf, backend=implementation.backend)
    outs = ours, pool_of(masks, plain), pool_of(masks, exact)
    assert_as_exact(*(out.detach().cpu() for out in outs))
    grad = torch.randn(outs[0].shape)
    grads = [gradients(out, [x], grad.to(out.device))[0] for out, x in zip(outs, (leaf, plain, exact))]
    assert_as_exact(*(g.cpu() for g in grads), what="gradient")
    assert grads[0].is_contiguous() or not leaf.is_contiguous()
    if leaf.ndim == 4 and leaf.is_contiguous(memory_format=torch.channels_last):
        assert grads[0].is_contiguous(memory_format=torch.channels_last)


SHAPES = [(1, 37, 150, (9, 14)), (2, 5, 33, (7, 5)), (1, 70, 7, (200,)), (3, 1, 1, (1, 1)), (1, 3, 20, (37, 60))]  # B, N, C, size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("implementation", POOLS, indirect=True)
def test_pool(implementation, density, dtype):
    for shape in SHAPES[1:] if implementation.slow else SHAPES:
        masks, features = inputs(*shape, density, dtype)
        assert_pools(implementation, masks, features)
        if len(shape[3]) == 2:
            assert_pools(implementation, masks, features.contiguous(memory_format=torch.channels_last))


def test_pool_of_a_large_map(isa):
    """Several tiles of outputs, chunks of channels and groups of pixels; sums from few to all of the pixels."""
    masks, features = inputs(1, 300, 290, (40, 53), 0.5)
    masks += torch.linspace(-0.6, 0.6, 300).view(1, -1, 1, 1)
    assert_pools(POOLS[0].values[0], masks, features)
    assert_pools(POOLS[0].values[0], masks, features.contiguous(memory_format=torch.channels_last))


def assert_within(result: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Rounding of a sum whose terms have the magnitudes `terms` together, and once to the result's dtype."""
    allowed = 8 * torch.finfo(torch.float32).eps * terms + torch.finfo(result.dtype).eps * exact.abs()
    assert ((result.double() - exact).abs() <= allowed + torch.finfo(result.dtype).tiny).all()


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape(data):
    """Of few numbers the reference may be exact by chance: held to a bound instead."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    B, N, C, M = (draw(*r) for r in ((1, 3), (1, 150), (1, 200), (1, 200)))
    dtype, density = data.draw(st.sampled_from(DTYPES)), data.draw(st.floats(0, 1))
    masks, features = inputs(B, N, C, (M,), density, dtype)
    grad, on = torch.randn(B, N, C), (masks > 0).double()
    out = mask_pool(masks, features.requires_grad_())
    assert_within(out, on @ features.double().mT, on @ features.double().abs().mT)
    (result,) = gradients(out, [features], grad)
    assert_within(result, grad.double().mT @ on, grad.double().abs().mT @ on)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", POOLS, indirect=True)
def test_threshold(implementation, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    edge = [0.0, -0.0, tiny, -tiny, float("nan"), -float("nan"), float("inf"), -float("inf"), 1e-7, 1.0]
    masks = torch.tensor(edge * 7, dtype=dtype).view(1, 1, 70)
    features = torch.eye(70).view(1, 70, 70)
    on = mask_pool(*implementation.place(masks, features), backend=implementation.backend).cpu()
    assert on.flatten().tolist() == (masks > 0).float().flatten().tolist()
    published = (masks.float().sigmoid() > 0.5).flatten()
    differ = (on.flatten() > 0) != published
    assert (masks.flatten()[differ].abs() <= 1.5 * 2.0**-24).all(), "the sigmoid of these does not round to 0.5"


@pytest.mark.parametrize("density", [0.05, 0.9])
@pytest.mark.parametrize("implementation", POOLS, indirect=True)
def test_non_finite_features_stay_in_their_masks(implementation, density):
    masks, features = inputs(1, 20, 17, (130,), density)
    bad = torch.tensor([float("nan"), float("inf"), -float("inf")])
    where = torch.tensor([5, 77, 129])
    clean = pool_of(masks, features.index_fill(2, where, 0.0))
    features[..., where] = bad
    out = mask_pool(*implementation.place(masks, features), backend=implementation.backend).cpu()
    for n in range(20):
        expected = clean[0, n] + bad[masks[0, n, where] > 0].sum()
        torch.testing.assert_close(out[0, n], expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_results_do_not_depend_on_threads():
    masks, features = inputs(2, 150, 256, (30, 41), 0.3)
    updator, kernels = KernelUpdator(64), torch.randn(150, 64, requires_grad=True)
    features.requires_grad_()

    def run(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        pooled = mask_pool(masks, features)
        updated = updator(pooled[0, :, :64].detach(), kernels)
        result = [pooled, updated, *torch.autograd.grad(pooled.square().sum(), features)]
        result += torch.autograd.grad(updated.square().sum(), [kernels, *updator.parameters()])
        torch.set_num_threads(before)
        return result

    first = run(2)
    for threads in (2, 1, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(threads)))


def perturbed(C: int, dtype=torch.float32) -> KernelUpdator:
    updator = KernelUpdator(C)
    for p in updator.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return updator.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", UPDATES, indirect=True)
def test_update(implementation, dtype):
    for shape in [(2, 9, 32), (5, 33)] if implementation.slow else [(2, 20, 150), (5, 33), (1, 1), (230, 16)]:
        pooled, kernels, grad = 5 * torch.randn(shape), torch.randn(shape).to(dtype), torch.randn(shape)
        updator = perturbed(shape[-1], dtype)
        runs = {
            "ours": (updator.to(implementation.device), dict(backend=implementation.backend), lambda t: implementation.place(t)[0]),
            "same": (None, dict(backend="reference"), lambda t: t),
            "exact": (None, dict(backend="reference"), lambda t: t.double()),
        }
        results = {}
        for name, (module, options, place) in runs.items():
            module = module or perturbed(shape[-1], dtype)
            module.load_state_dict(updator.state_dict())
            module = module.double() if name == "exact" else module
            leaves = [place(t).requires_grad_() for t in (pooled, kernels)] + list(module.parameters())
            out = module(*leaves[:2], **options)
            results[name] = [t.detach().cpu() for t in (out, *gradients(out, leaves, grad.to(out.device)))]
        names = ["result", "pooled", "kernels", *dict(updator.named_parameters())]
        for name, *three in zip(names, *results.values()):
            assert_as_exact(*three, what=name)


@pytest.mark.parametrize("empty", ["B", "N", "C", "M"])
def test_empty_inputs(empty):
    size = dict(B=2, N=4, C=8, M=9) | {empty: 0}
    B, N, C, M = size.values()
    masks, features = torch.ones(B, N, M), torch.ones(B, C, M, requires_grad=True)
    pooled = mask_pool(masks, features)
    assert pooled.shape == (B, N, C) and (pooled == 0).all()
    (grad,) = torch.autograd.grad(pooled.sum(), features)
    assert grad.shape == features.shape
    if C:
        updator = KernelUpdator(C)
        out = kernel_update(masks, features, torch.ones(B, N, C), updator)
        assert out.shape == (B, N, C)
        for p, grad in zip(updator.parameters(), torch.autograd.grad(out.sum(), list(updator.parameters()))):
            assert grad.shape == p.shape and (N and B or (grad == 0).all())


def test_soft_masks_weight_the_pixels():
    masks, features = torch.rand(2, 5, 6, 7, requires_grad=True), torch.randn(2, 3, 6, 7, requires_grad=True)
    pooled = mask_pool(masks, features, soft=True)
    expected = torch.einsum("bnhw,bchw->bnc", masks, features)
    torch.testing.assert_close(pooled, expected)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), [masks, features]) for out in (pooled, expected))):
        torch.testing.assert_close(a, b)


def test_hard_masks_get_no_gradient():
    masks, features = (t.requires_grad_() for t in inputs(1, 3, 4, (5,), 0.5))
    assert torch.autograd.grad(mask_pool(masks, features).sum(), [masks, features], allow_unused=True)[0] is None


def test_other_strides():
    masks, features = inputs(2, 6, 12, (20, 30), 0.4)
    expected = mask_pool(masks[:, ::2, :, ::3], features[:, ::2, :, ::3])
    assert torch.equal(mask_pool(masks[:, ::2, :, ::3].contiguous(), features[:, ::2, :, ::3].contiguous()), expected)
    updator, pooled = perturbed(6), torch.randn(2, 6, 4)
    kernels = torch.randn(2, 6, 4)
    assert torch.equal(updator(pooled.mT, kernels.mT), updator(pooled.mT.contiguous(), kernels.mT.contiguous()))


def test_float64_and_mixed_precision():
    masks, features = inputs(1, 4, 8, (30,), 0.5)
    exact = mask_pool(masks.double(), features.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(mask_pool(masks.bfloat16(), features), exact.float())
    updator, kernels = perturbed(8), torch.randn(1, 4, 8)
    mixed = updator(exact.float(), kernels.bfloat16())
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), updator(exact.float(), kernels), atol=0.05, rtol=0.02)
    assert updator.double()(exact, kernels.double()).dtype == torch.float64


def test_opcheck():
    masks, features = inputs(2, 5, 12, (21,), 0.5)
    ops = torch.ops.pyvseg
    for x in (features, features.mT.contiguous().mT):
        torch.library.opcheck(ops.mask_pool.default, (masks, x.requires_grad_()))
    for channels_last in (False, True):
        torch.library.opcheck(ops.mask_pool_backward.default, (torch.randn(2, 5, 12), masks, torch.bfloat16, channels_last))
    rows = [torch.randn(6, 12, requires_grad=True) for _ in range(2)]
    names = "dynamic_layer input_layer input_gate update_gate fc_layer norm_in norm_out input_norm_in input_norm_out fc_norm".split()
    updator = perturbed(12)
    parameters = [p for name in names for p in getattr(updator, name).parameters()]
    torch.library.opcheck(ops.kernel_update.default, (*rows, parameters, 1e-5))
    with torch.no_grad():
        out, state = ops.kernel_update(*rows, parameters, 1e-5)
        detached = [t.detach() for t in (*rows, *parameters)]
        torch.testing.assert_close(out, reference_update(*detached[:2], detached[2:]))
        torch.library.opcheck(ops.kernel_update_backward.default, (torch.randn(6, 12), *detached[:2], detached[2:], state, 1e-5))


def test_compile_and_export():
    masks, features = inputs(2, 5, 16, (6, 7), 0.5)
    updator, kernels = perturbed(16), torch.randn(2, 5, 16)
    eager = kernel_update(masks, features, kernels, updator)
    compiled = torch.compile(lambda *t: kernel_update(*t, updator) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(masks, features, kernels), eager * 2)

    class Update(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.updator = updator

        def forward(self, *tensors: Tensor) -> Tensor:
            return kernel_update(*tensors, self.updator)

    assert torch.equal(torch.export.export(Update(), (masks, features, kernels)).module()(masks, features, kernels), eager)


BAD = {
    "masks must be a tensor, got list": (TypeError, dict(masks=[1])),
    "masks must be floating point, got torch.bool": (TypeError, dict(masks=torch.ones(2, 5, 3, 4, dtype=torch.bool))),
    "masks must have a batch, a channel and at least one space dimension": (ValueError, dict(masks=torch.ones(5, 3))),
    r"features must be \(B=2, C, 3, 4\) to go with masks, got \(2, 8, 4, 3\)": (ValueError, dict(features=torch.ones(2, 8, 4, 3))),
    "features is on meta but masks on cpu": (ValueError, dict(features=torch.ones(2, 8, 3, 4, device="meta"))),
    r"kernels must be \(..., C=8\), got shape \(2, 5, 7\)": (ValueError, dict(kernels=torch.ones(2, 5, 7))),
    r"pooled must have the kernels' shape \(2, 6, 8\), got \(2, 5, 8\)": (ValueError, dict(kernels=torch.ones(2, 6, 8))),
    "kernels must be floating point": (TypeError, dict(kernels=torch.ones(2, 5, 8, dtype=torch.int32))),
    "backend='cpu' takes torch.float32": (TypeError, dict(masks=torch.ones(2, 5, 3, 4).double(), backend="cpu")),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments(message):
    error, change = BAD[message]
    args = dict(masks=torch.ones(2, 5, 3, 4), features=torch.ones(2, 8, 3, 4), kernels=torch.ones(2, 5, 8), updator=KernelUpdator(8))
    with pytest.raises(error, match=message):
        kernel_update(**(args | change))


def test_direct_calls_of_the_ops_are_checked():
    ops, masks, features = torch.ops.pyvseg, torch.ones(1, 3, 9), torch.ones(1, 4, 9)
    with pytest.raises(RuntimeError, match="shapes do not agree"):
        ops.mask_pool(masks, features[..., :8])
    with pytest.raises(RuntimeError, match="shapes do not agree"):
        ops.mask_pool_backward(torch.ones(1, 2, 4), masks, torch.float32, False)
    parameters = [p for p in KernelUpdator(4).parameters()]
    with pytest.raises(RuntimeError, match="wrong number of parameters"):
        ops.kernel_update(torch.ones(3, 4), torch.ones(3, 4), parameters[:-1], 1e-5)
    with pytest.raises(RuntimeError, match="wrong shape"):
        ops.kernel_update(torch.ones(3, 4), torch.ones(3, 4), parameters[::-1], 1e-5)
