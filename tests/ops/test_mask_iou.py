# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyvseg.ops import PackedMasks, mask_iou, mask_overlap, pack_masks
from tests.ops.numerics import assert_as_exact


def exact_overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = a.flatten(1), b.flatten(1)
    return (a[:, None] & b[None]).sum(-1), a.sum(1), b.sum(1)


def random_masks(n: int, *size: int) -> Tensor:
    return torch.rand(n, *size) < torch.rand(n, *[1] * len(size))  # from empty to full


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("n, m, size", [(5, 3, (7, 30, 41)), (1, 1, (1,)), (9, 17, (64,)), (4, 4, (1024,)), (13, 2, (3, 511))])
def test_counts_are_exact(isa, backend, n, m, size):
    a, b = random_masks(n, *size), random_masks(m, *size)
    for mine, theirs in zip(mask_overlap(a, b, backend=backend), exact_overlap(a, b)):
        assert mine.dtype == torch.int64
        assert torch.equal(mine, theirs)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 700), st.integers(0, 2**31))
def test_any_shape(n, m, numel, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(k, numel, generator=generator) < torch.rand(k, 1, generator=generator) for k in (n, m))
    exact = exact_overlap(a, b)
    for mine, theirs in zip(mask_overlap(a, b), exact):
        assert torch.equal(mine, theirs)
    union = exact[1][:, None] + exact[2] - exact[0]
    assert torch.equal(mask_iou(a, b), exact[0] / union.clamp(min=1))  # in one call


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_bits_are_as_documented(isa, dtype, numel):
    values = torch.randn(3, numel) if dtype.is_floating_point else torch.randint(0, 3, (3, numel))
    masks = values.to(dtype)
    packed = pack_masks(masks)
    assert packed.numel == numel and packed.bits.dtype == torch.int64 and packed.bits.shape == (3, -(-numel // 64))
    bits = np.unpackbits(packed.bits.numpy().view(np.uint8), axis=1, bitorder="little")
    assert np.array_equal(bits[:, :numel], (masks > 0).numpy())
    assert not bits[:, numel:].any()
    assert torch.equal(packed.bits, pack_masks(masks, backend="reference").bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threshold_of_logits(isa, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    subnormal = tiny / 4
    edge = [0.0, -0.0, tiny, -tiny, float("nan"), -float("nan"), float("inf"), -float("inf"), subnormal, 1.0]
    logits = torch.tensor(edge * 13, dtype=dtype).unsqueeze(0)
    set_bits = np.unpackbits(pack_masks(logits).bits.numpy().view(np.uint8), bitorder="little")[: logits.numel()]
    assert np.array_equal(set_bits, np.array([0, 0, 1, 0, 0, 0, 1, 0, 1, 1] * 13))


def test_agrees_with_pycocotools():
    from pycocotools import mask as coco  # here, as GPU machines do without it

    a, b = random_masks(6, 31, 47), random_masks(4, 31, 47)
    rle = lambda masks: [coco.encode(np.asfortranarray(m.numpy().astype(np.uint8))) for m in masks]  # noqa: E731
    assert np.allclose(mask_iou(a, b).numpy(), coco.iou(rle(a), rle(b), [0] * 4), atol=1e-7)


def test_every_form_of_one_mask_agrees():
    logits, other = torch.randn(5, 3, 20, 33), torch.randn(4, 3, 20, 33)
    plain = mask_iou(logits > 0, other > 0)
    assert plain.dtype == torch.float32 and plain.shape == (5, 4)
    assert torch.equal(mask_iou(pack_masks(logits), pack_masks(other)), plain)
    assert torch.equal(mask_iou(pack_masks(logits), other > 0), plain)
    torch.testing.assert_close(mask_iou((logits > 0).float(), (other > 0).float()), plain)
    same = logits > 0
    assert torch.equal(mask_iou(same, same).diagonal(), torch.ones(5))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_empty_masks_have_iou_zero(kind):
    a = torch.zeros(2, 90, dtype=kind)
    a[1, 3] = 1
    assert torch.equal(mask_iou(a, a), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize("n, m, size", [(0, 3, (4, 5)), (3, 0, (4, 5)), (2, 3, (0, 5)), (0, 0, (0,))])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_nothing_to_compare(n, m, size, kind):
    out = mask_iou(torch.zeros(n, *size, dtype=kind), torch.zeros(m, *size, dtype=kind))
    assert out.shape == (n, m) and (out == 0).all()


def test_soft_iou_and_its_gradients():
    a, b = torch.rand(5, 3, 40).requires_grad_(), torch.rand(4, 3, 40).requires_grad_()

    def plain(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.flatten(1)[:, None], b.flatten(1)[None]
        return (a * b).sum(-1) / (a + b - a * b).sum(-1)

    weight = torch.randn(5, 4)
    exact_leaves = [t.detach().double().requires_grad_() for t in (a, b)]
    exact, same, mine = plain(*exact_leaves), plain(a, b), mask_iou(a, b)
    assert_as_exact(mine.detach(), same.detach(), exact.detach())
    grads = (torch.autograd.grad((out * weight).sum(), leaves) for out, leaves in ((mine, (a, b)), (same, (a, b)), (exact, exact_leaves)))
    for three in zip(*grads):
        assert_as_exact(*three, what="gradient")


def test_non_contiguous_masks():
    masks = random_masks(6, 20, 30)
    view = masks[::2].transpose(1, 2)
    assert torch.equal(pack_masks(view).bits, pack_masks(view.contiguous()).bits)


def test_opcheck_and_compile():
    masks = random_masks(5, 100)
    bits = pack_masks(masks).bits
    torch.library.opcheck(torch.ops.pyvseg.pack_masks.default, (masks,))
    torch.library.opcheck(torch.ops.pyvseg.mask_iou.default, (bits, bits))
    compiled = torch.compile(lambda a, b: mask_iou(a, b), fullgraph=True)
    other = random_masks(3, 100)
    torch.testing.assert_close(compiled(masks, other), mask_iou(masks, other))


BAD = {
    "a must be a bool tensor or PackedMasks, got torch.uint8": (TypeError, torch.ones(2, 8, dtype=torch.uint8), torch.ones(2, 8, dtype=torch.bool)),
    "a must be a bool tensor or PackedMasks, got list": (TypeError, [1], torch.ones(2, 8, dtype=torch.bool)),
    "b must be a bool tensor or PackedMasks, got torch.float32": (TypeError, torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 8)),
    "b has masks of 9 elements but a of 8": (ValueError, torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)),
    r"b must be \(M, \*S\) with a's S \(8,\)": (ValueError, torch.ones(2, 8), torch.ones(2, 9)),
    r"a.bits must be int64 of shape \(N, 2\)": (ValueError, PackedMasks(torch.ones(2, 3, dtype=torch.int64), 100), torch.ones(2, 100, dtype=torch.bool)),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments(message):
    error, a, b = BAD[message]
    with pytest.raises(error, match=message):
        mask_iou(a, b)


def test_pack_masks_refuses():
    with pytest.raises(TypeError, match="masks must be bool, uint8 or floating point, got torch.int64"):
        pack_masks(torch.ones(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"masks must be \(N, \*S\)"):
        pack_masks(torch.ones(8))
