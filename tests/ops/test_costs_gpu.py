# SPDX-License-Identifier: Apache-2.0
"""mask_iou, mask_cost, point_sample and memory_match on CUDA and Triton: real ones on a GPU, elsewhere emulated and interpreted."""

import pytest
import torch
from torch import Tensor

from pyvseg.ops import _dispatch, mask_costs, mask_overlap, memory_match, pack_masks, point_sample
from pyvseg.ops.mask_cost import reference as reference_costs
from pyvseg.ops.memory_match import reference as reference_match
from pyvseg.ops.point_sample import reference as reference_samples
from tests.ops.implementations import assert_replays, implementations
from tests.ops.numerics import assert_as_exact

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpus(op: str):
    return pytest.mark.parametrize("implementation", [each for each in implementations(op) if each.values[0].isa is None], indirect=True)


@on_gpus("pack_masks")
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, *DTYPES])
@pytest.mark.parametrize("numel", [1, 64, 80, 1000, 4160])
def test_pack(implementation, dtype, numel):
    masks = torch.randn(3, numel)
    masks[0, ::3], masks[1, ::5], masks[2, ::7] = float("nan"), float("inf"), -0.0
    masks = masks > 0 if dtype == torch.bool else masks.nan_to_num(0, 3, 0).abs().to(dtype) if dtype == torch.uint8 else masks.to(dtype)
    assert torch.equal(pack_masks(*implementation.place(masks), backend=implementation.backend).bits.cpu(), pack_masks(masks, backend="reference").bits)


@on_gpus("pack_masks")
def test_pack_of_rows_at_any_address(implementation):
    masks = torch.randn(5, 151)
    (placed,) = implementation.place(masks)
    for view, plain in ((placed[1:], masks[1:]), (placed[:, 1:129], masks[:, 1:129]), (placed.T, masks.T)):
        assert torch.equal(pack_masks(view, backend=implementation.backend).bits.cpu(), pack_masks(plain.contiguous(), backend="reference").bits)


@on_gpus("mask_iou")
@pytest.mark.parametrize("n, m, numel", [(1, 1, 1), (5, 3, 4500), (33, 40, 2100), (70, 2, 300), (0, 3, 70), (3, 0, 70), (3, 4, 0)])
def test_overlaps_are_exact(implementation, n, m, numel):
    a, b = (torch.rand(k, numel) < torch.rand(k, 1) for k in (n, m))
    expected = (a[:, None] & b).sum(-1), a.sum(1), b.sum(1)
    for mine, theirs in zip(mask_overlap(*implementation.place(a, b), backend=implementation.backend), expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)


def costs(n: int, m: int, *size: int, dtype=torch.float32, kind=torch.bool) -> tuple[Tensor, Tensor]:
    targets = torch.rand(m, *size)
    return (torch.randn(n, *size) * 5 - 1).to(dtype), targets < 0.2 if kind == torch.bool else targets.to(kind)


@on_gpus("mask_cost")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m, p", [(1, 1, 1), (7, 5, 300), (40, 20, 1100), (3, 70, 65), (0, 2, 5), (2, 0, 5), (2, 3, 0)])
def test_costs_and_gradients(implementation, dtype, n, m, p):
    logits, targets = costs(n, m, p, dtype=dtype, kind=dtype if p % 2 else torch.bool)
    weight = torch.randn(2, n, m)

    def run(function, logits: Tensor) -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        out = torch.stack(tuple(function(leaf, targets.to(leaf.device))))
        return [*out, torch.autograd.grad(out, leaf, weight.to(out))[0]]

    mine = run(lambda *args: mask_costs(*args, backend=implementation.backend), *implementation.place(logits))
    for what, one, *two in zip(("dice", "bce", "logits"), mine, run(reference_costs, logits), run(reference_costs, logits.double()), strict=True):
        assert_as_exact(one.detach().cpu(), *(t.detach() for t in two), what=what)


@on_gpus("mask_cost")
def test_costs_of_strided_rows_and_far_logits(implementation):
    logits, targets = costs(6, 4, 90)
    logits[0], logits[1], logits[2] = 200, -200, 1e-6
    for x, t in ((logits[:, 3:70], targets[:, 3:70]), (logits.T.contiguous().T, targets), (logits[::2], targets[1::2])):
        mine = mask_costs(x.to(implementation.device), t.to(implementation.device), backend=implementation.backend)
        for one, *two in zip(mine, reference_costs(x, t), reference_costs(x.double(), t), strict=True):
            assert_as_exact(one.cpu(), *two)


@on_gpus("point_sample")
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_and_gradients(implementation, dtype, each):
    masks, points = torch.randn(3, 2, 7, 11).to(dtype), torch.rand(*([3] if each else []), 60, 2) * 1.4 - 0.2
    weight = torch.randn(3, 2, 60).to(dtype)

    def run(function, masks: Tensor) -> list[Tensor]:
        leaf = masks.detach().requires_grad_()
        out = function(leaf, points.to(leaf.device))
        return [out, torch.autograd.grad(out, leaf, weight.to(out))[0]]

    sample = lambda *args: point_sample(*args, backend=implementation.backend)  # noqa: E731
    same, exact = run(reference_samples, masks), run(reference_samples, masks.double())
    try:
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            for one, *two in zip(run(sample, *implementation.place(masks)), same, exact, strict=True):
                assert_as_exact(one.detach().cpu(), *(t.detach() for t in two))
    finally:
        torch.use_deterministic_algorithms(False)


@on_gpus("point_sample")
def test_samples_of_bools_and_outside(implementation):
    masks = torch.rand(2, 1, 5, 1) < 0.5
    points = torch.tensor([[0.5, 0.1], [0.5, 1.05], [float("nan"), 0.5], [0.5, float("inf")], [-1e9, 0.5], [0.0, 0.0]])
    mine = point_sample(*implementation.place(masks, points), backend=implementation.backend)
    expected = reference_samples(masks, points.nan_to_num(-9, 9))
    torch.testing.assert_close(mine.cpu(), expected)
    assert point_sample(*implementation.place(masks[:0], points), backend=implementation.backend).shape == (0, 1, 6)


def embeddings(n: int, m: int, c: int, *batch: int, dtype=torch.float32) -> dict[str, Tensor]:
    scale = max(c, 1) ** -0.25
    return {
        "embeddings": (torch.randn(*batch, n, c) * scale).to(dtype), "memory": (torch.randn(*batch, m, c) * scale).to(dtype),
        "labels": torch.randint(0, 3, (*batch, n)), "memory_labels": torch.randint(0, 3, (*batch, m)),
    }  # fmt: skip


@on_gpus("memory_match")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m, c, batch", [(1, 1, 1, 1), (7, 40, 70, 2), (70, 9, 256, 1), (0, 4, 8, 1), (4, 0, 8, 1), (4, 3, 8, 0)])
def test_match_and_gradients(implementation, dtype, n, m, c, batch):
    given = embeddings(n, m, c, batch, dtype=dtype)
    weight = torch.randn(batch, n, m)

    def run(function, dtype, device="cpu") -> list[Tensor]:
        args = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in given.items()}
        leaves = [args[name].requires_grad_() for name in ("embeddings", "memory")]
        out = function(**args)
        return [out, *torch.autograd.grad(out, leaves, weight.to(out))]

    mine = run(lambda **args: memory_match(**args, backend=implementation.backend), dtype, implementation.device)
    plain = lambda **args: reference_match(args.pop("embeddings"), args.pop("memory"), "bisoftmax", **args)  # noqa: E731
    for what, one, *two in zip(("scores", "embeddings", "memory"), mine, run(plain, dtype), run(plain, torch.float64), strict=True):
        assert_as_exact(one.detach().cpu(), *(t.detach() for t in two), what=what)


@on_gpus("memory_match")
def test_match_saturates_at_half(implementation):
    pair = implementation.place(torch.tensor([[0.0, 300.0], [400.0, 500.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(memory_match(*pair, backend=implementation.backend).cpu(), torch.tensor([[0.0, 0.5], [0.5, 1.0]]))


@on_gpus("mask_cost")
def test_opcheck(implementation):
    kernels = _dispatch.kernels(implementation.backend)
    logits, targets = costs(3, 2, 40, kind=torch.float32)
    torch.library.opcheck(kernels.mask_cost.default, implementation.place(logits.requires_grad_(), targets.requires_grad_()))
    torch.library.opcheck(kernels.point_sample.default, implementation.place(torch.randn(2, 1, 4, 5, requires_grad=True), torch.rand(1, 6, 2)))
    pair = torch.randn(1, 4, 8, requires_grad=True), torch.randn(1, 3, 8, requires_grad=True)
    torch.library.opcheck(kernels.memory_match.default, (*implementation.place(*pair), None, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_graph_capture(backend):
    """No host synchronisation."""
    logits, targets = (t.cuda() for t in costs(100, 20, 5, 40, 60))
    tracks = {name: x.cuda() for name, x in embeddings(100, 150, 256).items()}

    def run() -> tuple[Tensor, ...]:
        packed = pack_masks(logits, backend=backend)
        return (*mask_overlap(packed, packed, backend=backend), *mask_costs(logits, targets, backend=backend), memory_match(**tracks, backend=backend))

    assert_replays(run)
