# SPDX-License-Identifier: Apache-2.0
"""What every implementation of every op must do, on one small problem each: agree with the reference, and repeat itself to
the bit in deterministic mode. On a GPU also: be captured in a CUDA graph, and never make the host wait."""

import warnings
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pyvseg import ops
from pyvseg.ops import _dispatch
from tests.ops.implementations import GPU, Implementation, implementations

SHAPES = [(6, 7), (3, 4), (1, 1)]
SAMPLES = (2, 5, 2, len(SHAPES), 4)  # B, Q, H, L, P
S = sum(h * w for h, w in SHAPES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT_ONLY = {"mask_winners"}
AXES = ops.Resampling.bilinear(5, 17, True), ops.Resampling.bilinear(6, 23, True)

# public op -> (kernel that must exist, arguments: floating-point tensors are cast to the dtype tested)
EXAMPLES: dict[str, tuple[str, Callable[[], dict]]] = {
    "kernel_update": ("kernel_update", lambda: dict(masks=torch.randn(2, 5, 9, 10), features=torch.randn(2, 32, 9, 10), kernels=torch.randn(2, 5, 32), updator=ops.KernelUpdator(32))),
    "kmeans_assign": ("kmeans_assign", lambda: dict(logits=torch.randn(2, 7, 6, 9))),
    "kmeans_attn": ("kmeans_attn", lambda: dict(pixel=torch.randn(2, 32, 6, 9), clusters=torch.randn(2, 7, 32), value=torch.randn(2, 24, 6, 9))),
    "kmeans_pool": ("kmeans_pool", lambda: dict(value=torch.randn(2, 24, 60), assign=torch.randint(-1, 8, (2, 60)), clusters=7)),
    "mask_costs": ("mask_cost", lambda: dict(logits=torch.randn(7, 3, 50), targets=torch.rand(4, 3, 50) > 0.5)),
    "mask_iou": ("mask_iou", lambda: dict(a=torch.rand(7, 3, 50) > 0.5, b=torch.rand(4, 3, 50) > 0.5)),
    "mask_pool": ("mask_pool", lambda: dict(masks=torch.randn(2, 5, 9, 10), features=torch.randn(2, 32, 9, 10))),
    "mask_winners": ("mask_winners", lambda: dict(logits=4 * torch.randn(2, 7, 5, 6), rows=AXES[0], columns=AXES[1], best=2)),
    "memory_match": ("memory_match", lambda: dict(embeddings=torch.randn(2, 7, 32), memory=torch.randn(2, 9, 32))),
    "memory_read": ("memory_read", lambda: dict(memory_key=torch.randn(1, 90, 32), memory_value=torch.randn(1, 2, 90, 24), query_key=torch.randn(1, 11, 32), top_k=6)),
    "ms_deform_attn": ("ms_deform_attn", lambda: dict(value=torch.randn(2, S, 2, 32), spatial_shapes=SHAPES, sampling_locations=torch.rand(*SAMPLES, 2), attention_weights=torch.rand(*SAMPLES))),
    "ms_deform_attn_fused": ("ms_deform_attn_fused", lambda: dict(value=torch.randn(2, S, 2, 32), spatial_shapes=SHAPES, reference_points=torch.rand(2, 5, len(SHAPES), 2), sampling_offsets=torch.randn(*SAMPLES, 2), attention_logits=torch.randn(*SAMPLES))),
    "pack_masks": ("pack_masks", lambda: dict(masks=torch.randn(5, 3, 50))),
    "point_sample": ("point_sample", lambda: dict(masks=torch.randn(5, 3, 8, 9), points=torch.rand(13, 2))),
}  # fmt: skip
EVERY = [pytest.param(op, *each.values, id=f"{op}-{each.id}", marks=each.marks) for op, (kernel, _) in EXAMPLES.items() for each in implementations(kernel)]


def on(those: Callable[[Implementation], bool]):
    return pytest.mark.parametrize("op, implementation", [each for each in EVERY if those(each.values[1])], indirect=["implementation"])


on_gpus = on(lambda implementation: implementation.device == "cuda")


def example(op: str, implementation: Implementation, dtype: torch.dtype) -> dict:
    def place(x):
        if isinstance(x, torch.nn.Module):
            return x.to(implementation.device, dtype)
        if not isinstance(x, Tensor):
            return x
        x = x.to(implementation.device)
        return x if op in FLOAT_ONLY else x.to(dtype).requires_grad_() if x.is_floating_point() else x

    return {name: place(x) for name, x in EXAMPLES[op][1]().items()}


def run(op: str, arguments: dict, backend: str) -> list[Tensor | None]:
    """The results, and the gradients of the sum of their squares."""
    result = getattr(ops, op)(**arguments, backend=backend)
    results = [t for t in ([result] if isinstance(result, Tensor) else result) if isinstance(t, Tensor)]
    smooth = [t.float().square().sum() for t in results if t.requires_grad]
    leaves = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]
    grads = torch.autograd.grad(sum(smooth), leaves, allow_unused=True) if smooth else ()
    return [None if t is None else t.detach() for t in (*results, *grads)]


@contextmanager
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@on(lambda implementation: True)
@pytest.mark.parametrize("dtype", DTYPES if GPU else [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_the_reference(op, implementation, dtype):
    """Coarse, on all ops alike; each op's own tests hold it to float64."""
    arguments = example(op, implementation, dtype)
    ours, plain = (run(op, arguments, backend) for backend in (implementation.backend, "reference"))
    assert len(ours) == len(plain)
    for mine, theirs in zip(ours, plain):
        if mine is None:
            continue  # a gradient that the op says it does not give
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        scale = theirs.double().abs().max().clamp(min=1)
        tolerance = 1e-4 if dtype == torch.float32 else 4e-2
        close = (mine.double() - theirs.double()).abs() <= tolerance * scale
        assert close.double().mean() >= (1 if mine.is_floating_point() else 0.98)  # near ties fall differently in half precision


@on(lambda implementation: implementation.name != "triton-interpreted")
def test_deterministic_mode(op, implementation):
    arguments = example(op, implementation, torch.float32)
    with deterministic():
        first, again = (run(op, arguments, implementation.backend) for _ in range(2))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, again))


@on_gpus
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_graph(op, implementation, dtype):
    """Captured once, replayed on other numbers."""
    arguments, others = (example(op, implementation, dtype) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), deterministic():
        run(op, arguments, implementation.backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with deterministic(), torch.cuda.graph(graph):
        captured = run(op, arguments, implementation.backend)
    with torch.no_grad():
        for name, x in arguments.items():
            if isinstance(x, Tensor):
                x.copy_(others[name])
    graph.replay()
    with deterministic():
        eager = run(op, arguments, implementation.backend)
    for a, b in zip(captured, eager):
        assert a is b is None or torch.equal(a, b)


@on_gpus
def test_the_host_never_waits(op, implementation):
    arguments = example(op, implementation, torch.float32)
    run(op, arguments, implementation.backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, arguments, implementation.backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("op", EXAMPLES)
def test_a_gpu_has_every_op(op):
    """Compiled or in Triton: on a GPU nothing may fall back to the reference."""
    kernel, _ = EXAMPLES[op]
    assert GPU
    assert any(each.values[0].device == "cuda" for each in implementations(kernel)), f"no GPU kernel of {kernel}"


def test_every_kernel_of_a_public_op_has_an_example():
    public = {name for name in ops.__all__ if name[0].islower()}
    hosts = {"backend", "report", "conv3x3", "conv3x3_weight", "greedy_assignment", "hungarian_assignment", "mask_overlap"}  # no GPU kernels wanted
    hosts |= {"inverted_residual", "inverted_residual_weight"}
    hosts |= {"axial_attention", "mask_bands", "masked_attn"}  # on a GPU they are PyTorch
    assert public - hosts <= EXAMPLES.keys()
    assert _dispatch.extension is not None


def test_only_ops_with_gpu_kernels_tell_that_they_lack_them(monkeypatch):
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setattr(_dispatch, "missing", lambda op, name: "no GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for op in ("axial_attention", "conv3x3", "masked_attn"):
            _dispatch._warn(op, "cuda", "3 times")
    with pytest.warns(UserWarning, match="kmeans_pool runs on the PyTorch reference"):
        _dispatch._warn("kmeans_pool", "cuda", "3 times")
