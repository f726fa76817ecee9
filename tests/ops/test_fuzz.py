# SPDX-License-Identifier: Apache-2.0
"""Whatever comes in: a clear Python error or a defined result, never a crash. `make sanitize` runs this file under
AddressSanitizer and UBSan, where reading or writing outside of a tensor is a crash too.

Every public op is called with arguments that fit, drawn in any shape, stride, dtype and value, and then with one of them
spoiled. The kernels behind it, forward and backward, are called directly with one of their arguments spoiled.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyvseg import ops
from tests.cuda import emulator
from tests.ops.implementations import _cuda_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NUMBERS = (0.0, 1.0, -1.0, 0.5, 1e30, -1e30, 1e-40, float("nan"), float("inf"), -float("inf"))


class Draw:
    """Makes arguments from hypothesis' choices; one dtype per example, now and then another for one tensor."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.dtype = self.pick(DTYPES)
        self.generator = torch.Generator().manual_seed(self.data.draw(st.integers(0, 1 << 30)))

    def pick(self, among):
        return self.data.draw(st.sampled_from(list(among)))

    def size(self, *usual: int) -> int:
        return self.pick(usual or (1, 2, 3, 5, 17, 33, 0))

    def sizes(self, n: int) -> list[int]:
        return [self.size() for _ in range(n)]

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers, some special, laid out contiguously, transposed, or inside of a larger tensor."""
        whole = torch.randn(*(n + 1 for n in shape), generator=self.generator)
        special = torch.tensor(NUMBERS)[torch.randint(0, len(NUMBERS), whole.shape, generator=self.generator)]
        rare = torch.rand(whole.shape, generator=self.generator) < self.pick((0.0, 0.0, 0.05, 1.0))
        whole = torch.where(rare, special, whole).to(dtype or self.dtype)
        part = whole[tuple(slice(1, None) for _ in shape)]
        layout = self.pick(("contiguous", "contiguous", "inside", "transposed"))
        if layout == "inside":
            return part
        return part.contiguous() if layout == "contiguous" or part.ndim < 2 else part.mT.contiguous().mT

    def mask(self, *shape: int) -> Tensor:
        return self.tensor(*shape, dtype=torch.float32) > 0

    def spoil(self, value):
        """Something near the value that does not fit, or does."""
        if isinstance(value, Tensor):
            return self.pick((self._reshape, self._retype, lambda t: t.to("meta"), lambda t: None, lambda t: 1.5, self._far))(value)
        if isinstance(value, bool) or value is None:
            return self.pick((True, None, 0.5))
        if isinstance(value, (list, tuple)):
            return self.pick(([], [*value, 1], list(value)[:-1], [0] * len(value), [-1] * len(value), [1 << 40] * len(value), None))
        return self.pick((-1 << 40, -1, 0, 1, 7, 1 << 40, None, "a"))

    def _reshape(self, t: Tensor) -> Tensor:
        shape = list(t.shape)
        if not shape or self.pick((False, False, True)):
            return self.pick((t.unsqueeze(0), t.flatten(), t.flatten()[:0], t.new_zeros(())))
        axis = self.pick(range(len(shape)))
        shape[axis] = max(0, shape[axis] + self.pick((-1, 1, 2)))
        return self.tensor(*shape, dtype=torch.float32).to(t.dtype)

    def _retype(self, t: Tensor) -> Tensor:
        return t.to(self.pick((torch.float64, torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.bool, torch.complex64)))

    def _far(self, t: Tensor) -> Tensor:
        return torch.full(t.shape, self.pick((100.0, -100.0, 2.0**30)), dtype=torch.float64).to(t.dtype)


def axial_attention(d: Draw) -> dict:
    B, H, W, heads, K, V, R = d.size(1, 2, 0), *d.sizes(2), d.size(1, 2, 3), d.size(1, 4, 5, 17, 0), d.size(1, 2, 6, 17, 0), d.size(33, 40, 2)
    tables = {f"{name}_table": d.tensor(2 * R + 1, depth) for name, depth in (("query", K), ("key", K), ("value", V))}
    scales = dict(scales=d.tensor(3, heads), value_scale=d.tensor(heads, V))
    return dict(qkv=d.tensor(B, H, W, heads * (2 * K + V)), **tables, **scales, axis=d.pick((1, 2)))


def conv3x3(d: Draw) -> dict:
    N, I, O, H, W = d.size(1, 2, 0), d.size(1, 3, 33), d.size(1, 3, 33), d.size(), d.size()
    weight = ops.conv3x3_weight(torch.randn(O, I, 3, 3))
    return dict(x=d.tensor(N, I, H, W, dtype=torch.float32), weight=weight, relu_input=d.pick((False, True)))


def inverted_residual(d: Draw) -> dict:
    I, C, O, k = d.size(1, 3, 17), d.size(1, 3, 17), d.size(1, 3, 17), d.pick((1, 3, 5))
    depthwise, project = (torch.randn(C, 1, k, k), torch.randn(C)), (torch.randn(O, C, 1, 1), torch.randn(O))
    weight = ops.inverted_residual_weight((torch.randn(C, I, 1, 1), torch.randn(C)), depthwise, project)
    return dict(x=d.tensor(d.size(1, 2, 0), I, d.size(), d.size(), dtype=torch.float32), weight=weight, stride=d.pick((1, min(2, k))), residual=d.pick((False, I == O)))


def kmeans_attn(d: Draw) -> dict:
    B, T, C, D, N, H, W = d.size(1, 2, 0), d.size(1, 2), *d.sizes(5)
    return dict(pixel=d.tensor(B * T, C, H, W), clusters=d.tensor(B, N, C), value=d.tensor(B * T, D, H, W), scale=d.tensor(N, dtype=torch.float32),
                reduction=d.pick(("sum", "mean")), want_logits=d.pick((False, True)))  # fmt: skip


def kmeans_pool(d: Draw) -> dict:
    B, D, M, clusters = d.sizes(4)
    return dict(value=d.tensor(B, D, M), assign=torch.randint(-2, clusters + 2, (B, M), generator=d.generator), clusters=clusters)


def kmeans_assign(d: Draw) -> dict:
    return dict(logits=d.tensor(*d.sizes(4)))


def kernel_update(d: Draw) -> dict:
    B, N, C, H, W = d.size(1, 2, 0), d.size(), d.size(1, 8, 33), *d.sizes(2)
    masks, features = d.tensor(B, N, H, W), d.tensor(B, C, H, W)
    updator = ops.KernelUpdator(C).to(d.dtype)
    return dict(masks=masks, features=features, kernels=d.tensor(B, N, C), updator=updator, soft=d.pick((False, True)))


def mask_pool(d: Draw) -> dict:
    B, N, C, H, W = d.sizes(5)
    return dict(masks=d.tensor(B, N, H, W), features=d.tensor(B, C, H, W), soft=d.pick((False, True)))


def mask_costs(d: Draw) -> dict:
    N, M, T, H, W, K = d.sizes(6)
    targets = d.pick((d.mask, d.tensor))(M, T, H, W)
    return dict(logits=d.tensor(N, T, H, W), targets=targets, points=d.pick((None, d.tensor(K, 2))))


def mask_iou(d: Draw) -> dict:
    N, M, T, P = d.size(), d.size(), d.size(1, 2, 0), d.size(1, 63, 64, 65, 200, 0)
    make = d.pick((d.mask, d.tensor, lambda *shape: ops.pack_masks(d.mask(*shape))))
    return dict(a=make(N, T, P), b=make(M, T, P))


def pack_masks(d: Draw) -> dict:
    return dict(masks=d.pick((d.mask, d.tensor))(d.size(), d.size(1, 63, 64, 65, 200, 0)))


def memory_match(d: Draw) -> dict:
    B, N, M, C = d.sizes(4)
    labels = lambda: dict(labels=torch.ones(B, N, dtype=torch.int64), memory_labels=torch.ones(B, M, dtype=torch.int64))  # noqa: E731
    locations = lambda: dict(locations=d.tensor(B, N, 4), memory_locations=d.tensor(B, M, 4))  # noqa: E731
    more = d.pick((dict, labels, locations))()
    return dict(embeddings=d.tensor(B, N, C), memory=d.tensor(B, M, C), metric=d.pick(("dot", "cosine", "softmax", "bisoftmax"))) | more


def greedy_assignment(d: Draw) -> dict:
    return dict(scores=d.tensor(*d.sizes(2)), threshold=d.pick((0, 0.5, -1)))


def memory_read(d: Draw) -> dict:
    B, N, M, O, CK, CV = d.size(1, 2, 0), d.size(1, 5, 70, 0), *d.sizes(4)
    terms = d.pick((dict, lambda: dict(shrinkage=d.tensor(B, N), selection=d.tensor(B, M, CK))))()
    return dict(memory_key=d.tensor(B, N, CK), memory_value=d.tensor(B, O, N, CV), query_key=d.tensor(B, M, CK), top_k=d.pick((1, 2, 20, 90, None)),
                return_usage=d.pick((False, True))) | terms  # fmt: skip


def _sampling(d: Draw) -> tuple:
    B, Q, H, D, P = d.size(1, 2, 0), d.size(), d.size(1, 2, 3), d.size(1, 8, 32, 5, 0), d.size(1, 4, 3, 0)
    shapes = [(d.size(1, 2, 5, 0), d.size(1, 3, 8)) for _ in range(d.size(1, 2, 4))]
    value = d.tensor(B, sum(h * w for h, w in shapes), H, D)
    geometry = d.pick((d.dtype, torch.float32))
    return value, shapes, (B, Q, H, len(shapes), P), geometry


def ms_deform_attn(d: Draw) -> dict:
    value, shapes, samples, dtype = _sampling(d)
    return dict(value=value, spatial_shapes=shapes, sampling_locations=d.tensor(*samples, 2, dtype=dtype), attention_weights=d.tensor(*samples, dtype=dtype))


def ms_deform_attn_fused(d: Draw) -> dict:
    value, shapes, samples, dtype = _sampling(d)
    points = d.tensor(samples[0], samples[1], samples[3], d.pick((2, 4)), dtype=dtype)
    offsets, logits = d.tensor(*samples, 2, dtype=dtype), d.tensor(*samples, dtype=dtype)
    return dict(value=value, spatial_shapes=shapes, reference_points=points, sampling_offsets=offsets, attention_logits=logits)


def point_sample(d: Draw) -> dict:
    N, T, H, W, K = d.sizes(5)
    return dict(masks=d.pick((d.mask, d.tensor))(N, T, H, W), points=d.pick((d.tensor(K, 2), d.tensor(N, K, 2))))


def mask_winners(d: Draw) -> dict:
    T, N, h, w, H, W = d.sizes(6)
    axes = (ops.Resampling.bilinear(before, after, True) for before, after in ((h, H), (w, W)) if before)
    return dict(logits=d.tensor(T, N, h, w), rows=next(axes, None), columns=next(axes, None), best=d.pick((1, 2)))


def masked_attn(d: Draw) -> dict:
    B, N, M, H, D = d.size(1, 2, 0), d.size(), d.size(1, 70, 0), d.size(1, 2), d.size()
    return dict(query=d.tensor(B, N, H * D), key=d.tensor(B, M, H * D), value=d.tensor(B, M, H * D), masks=d.tensor(B, N, M), heads=H)


RECIPES = {
    recipe.__name__: recipe
    for recipe in (axial_attention, conv3x3, greedy_assignment, inverted_residual, kernel_update, kmeans_assign, kmeans_attn, kmeans_pool, mask_costs, mask_iou,
                   mask_pool, mask_winners, masked_attn, memory_match, memory_read, ms_deform_attn, ms_deform_attn_fused, pack_masks, point_sample)
} | {"hungarian_assignment": greedy_assignment}  # fmt: skip


def tensors_of(result) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for each in result for t in tensors_of(each)] if isinstance(result, (tuple, list)) else []


def call(name: str, arguments: dict, gradients: bool) -> None:
    """The public op, its results read to the last element, and its gradients."""
    if gradients:
        grad = lambda t: t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() and not t.is_meta else t  # noqa: E731
        arguments = {key: grad(value) for key, value in arguments.items()}
    results = tensors_of(getattr(ops, name)(**arguments))
    for t in results:
        t.detach().clone()
    leaves = [t for t in tensors_of(tuple(arguments.values())) if t.requires_grad]
    if leaves and (parts := [t.float().sum() for t in results if t.requires_grad]):
        for t in torch.autograd.grad(sum(parts), leaves, allow_unused=True):
            assert t is None or t.clone() is not None


fuzz = lambda n: settings(max_examples=n, suppress_health_check=list(HealthCheck))  # noqa: E731


@pytest.mark.parametrize("op", RECIPES)
@fuzz(60)
@given(data=st.data())
def test_public_ops(op, data):
    d = Draw(data)
    arguments = RECIPES[op](d)
    spoiled = d.pick((False, True))
    if spoiled:
        name = d.pick(arguments)
        arguments[name] = d.spoil(arguments[name])
    try:
        call(op, arguments, gradients=d.pick((False, True)))
    except (TypeError, ValueError, NotImplementedError) as error:  # the last one: what is on the meta device has no values
        assert str(error)


class Record(TorchDispatchMode):
    """Notes the calls of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyvseg":
            self.calls.append((func._opname, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))


def libraries() -> list[tuple[str, Callable[[str], bool]]]:
    emulate = not emulator.unavailable() and _cuda_ops()
    return [("pyvseg", lambda op: True)] + ([("pyvseg_emulated", _cuda_ops().__contains__)] if emulate else [])


@pytest.mark.parametrize("op", RECIPES)
@fuzz(40)
@given(data=st.data())
def test_kernels_called_directly(op, data):
    d = Draw(data)
    arguments = RECIPES[op](d)
    with Record() as record:
        try:
            call(op, arguments, gradients=True)
        except (TypeError, ValueError, NotImplementedError):
            return
    for kernel, args in record.calls:
        at = d.pick(range(len(args)))
        args = (*args[:at], d.spoil(args[at]), *args[at + 1 :])
        for library, holds in libraries():
            if library == "pyvseg_emulated":
                emulator.load()
            if holds(kernel):
                try:
                    for t in tensors_of(getattr(getattr(torch.ops, library), kernel)(*args)):
                        t.clone()
                except Exception as error:  # the process lives, and says something
                    assert str(error)


def test_every_public_op_is_here():
    public = {name for name in ops.__all__ if name[0].islower()} - {"backend", "report", "conv3x3_weight", "inverted_residual_weight", "mask_overlap", "mask_bands"}
    assert public <= RECIPES.keys(), "an op without a recipe"
