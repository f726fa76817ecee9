# SPDX-License-Identifier: Apache-2.0
"""Overlap and intersection over union of N x M masks over any number of dimensions: frames, tubes, volumes."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyvseg.ops import _dispatch

__all__ = ["PackedMasks", "mask_iou", "mask_overlap", "pack_masks"]

_PACKABLE = (torch.bool, torch.uint8, *_dispatch.DTYPES)
_SLOWER = "50 to 100 times"


class PackedMasks(NamedTuple):
    """N masks as bits; bit i of word w (little endian) is element 64 w + i of the flattened mask."""

    bits: Tensor  # (N, W) int64, W = ceil(numel / 64); bits past numel are zero
    numel: int  # elements of one mask


def pack_masks(
    masks: Tensor,  # (N, *S) bool, uint8 (set where non-zero), or float logits (set where > 0; NaN is not)
    *,
    backend: str = "auto",
) -> PackedMasks:
    """Masks as bits, a thirty-second of their size as float32; packs once what is compared many times.

    Raises ValueError for a tensor without a mask dimension, TypeError for other dtypes, naming the argument.
    """
    choice = _plan_pack(masks, backend)
    flat = _flat(masks.detach())
    bits = reference_pack(flat) if choice == "reference" else _dispatch.call(choice, "pack_masks", flat)
    return PackedMasks(bits, flat.shape[1])


def mask_overlap(
    a: Tensor | PackedMasks,  # (N, *S) bool, or packed
    b: Tensor | PackedMasks,  # (M, *S) bool, or packed
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Intersections (N, M), areas of a (N,) and of b (M,), int64, exact.

    Raises ValueError for masks of different sizes or devices, TypeError for other inputs, naming the argument.
    """
    same = a is b
    a = _packed("a", a, backend)
    b = a if same else _packed("b", b, backend)
    choice = _plan_overlap(*a, *b, backend)
    if choice == "reference":
        return reference_overlap(a.bits, b.bits)
    return _dispatch.call(choice, "mask_iou", a.bits, b.bits)


def mask_iou(
    a: Tensor | PackedMasks,  # (N, *S) bool or probabilities, or packed
    b: Tensor | PackedMasks,  # (M, *S) of the same kind
    *,
    backend: str = "auto",
) -> Tensor:  # (N, M) float32
    """Intersection over union of every a with every b; 0 where both masks are empty.

    Boolean or packed masks are counted exactly. Floating-point masks are probabilities in [0, 1] and give the soft IoU
    sum(ab) / (sum(a) + sum(b) - sum(ab)), differentiable in both; pack logits with `pack_masks` for the hard one.

    Raises ValueError for masks of different sizes or devices, TypeError for other inputs, naming the argument.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        choice = _plan_ratio(a, b, backend)
        if choice == "soft":
            return _iou(*_soft_overlap(a, b))
        if choice:
            return _dispatch.call(choice, "mask_ratio", _flat(a), _flat(b))
    return _iou(*mask_overlap(a, b, backend=backend))


def _flat(masks: Tensor) -> Tensor:
    return masks if masks.ndim == 2 else masks.reshape(masks.shape[0], masks.shape[1:].numel())


def _iou(intersection: Tensor, area_a: Tensor, area_b: Tensor) -> Tensor:
    union = area_a[:, None] + area_b[None, :] - intersection
    empty = union == 0
    return (intersection / union.masked_fill(empty, 1)).masked_fill(empty, 0).float()


def _soft_overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = _flat(a.float()), _flat(b.float())
    return a @ b.T, a.sum(1), b.sum(1)


def _packed(name: str, masks: Tensor | PackedMasks, backend: str) -> PackedMasks:
    if isinstance(masks, PackedMasks):
        words = -(-masks.numel // 64)
        if masks.bits.dtype != torch.int64 or masks.bits.ndim != 2 or masks.bits.shape[1] != words:
            raise ValueError(f"{name}.bits must be int64 of shape (N, {words}), got {masks.bits.dtype} {tuple(masks.bits.shape)}")
        return masks
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        kind = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"{name} must be a bool tensor or PackedMasks, got {kind}; pack_masks turns logits into bits")
    return pack_masks(masks, backend=backend)


@_dispatch.planned
def _plan_pack(masks: Tensor, backend: str) -> str:
    if not isinstance(masks, Tensor):
        raise TypeError(f"masks must be a tensor, got {type(masks).__name__}")
    if masks.dtype not in (torch.bool, torch.uint8) and not masks.is_floating_point():
        raise TypeError(f"masks must be bool, uint8 or floating point, got {masks.dtype}")
    if masks.ndim < 2:
        raise ValueError(f"masks must be (N, *S), got shape {tuple(masks.shape)}")
    return _dispatch.choose("mask_iou", backend, masks, dtypes=_PACKABLE, slower=_SLOWER)


@_dispatch.planned
def _plan_overlap(a: Tensor, size_a: int, b: Tensor, size_b: int, backend: str) -> str:
    if size_a != size_b or a.shape[1] != b.shape[1]:
        raise ValueError(f"b has masks of {size_b} elements but a of {size_a}")
    if a.device != b.device:
        raise ValueError(f"b is on {b.device} but a on {a.device}")
    return _dispatch.choose("mask_iou", backend, a, b, dtypes=(torch.int64,), slower=_SLOWER)


@_dispatch.planned
def _plan_ratio(a: Tensor, b: Tensor, backend: str) -> str:
    """The backend that has the ratio as one kernel, "soft" for probabilities, or nothing."""
    soft = a.is_floating_point() and b.is_floating_point()
    if soft and (a.ndim < 2 or b.ndim < 2 or a.shape[1:] != b.shape[1:]):
        raise ValueError(f"b must be (M, *S) with a's S {tuple(a.shape[1:])}, got shape {tuple(b.shape)}")
    if soft and a.device != b.device:
        raise ValueError(f"b is on {b.device} but a on {a.device}")
    if soft or a.dtype != torch.bool or b.dtype != torch.bool or a.shape[1:] != b.shape[1:] or a.ndim < 2 or a.device != b.device:
        return "soft" if soft else ""
    choice = _dispatch.choose("mask_iou", backend, a, b, dtypes=_PACKABLE, slower=_SLOWER)
    return "" if choice == "reference" or _dispatch.missing("mask_ratio", choice) else choice


def reference_pack(masks: Tensor) -> Tensor:
    """(N, P) -> bits (N, W) int64 in PyTorch."""
    N, P = masks.shape
    if masks.numel() == 0:
        return masks.new_zeros(N, -(-P // 64), dtype=torch.int64)
    on = torch.nn.functional.pad(masks > 0, (0, -P % 64)).view(torch.uint8).view(N, -(-P // 64) * 8, 8)
    octets = (on << torch.arange(8, dtype=torch.uint8, device=masks.device)).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int64)


def reference_overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition on bits (N, W), (M, W): counts by matrix product, in a dtype that holds them exactly."""
    exact = torch.float32 if 64 * a.shape[1] <= 1 << 24 else torch.float64
    a, b = (_unpack(bits).to(exact) for bits in (a, b))
    return (a @ b.T).long(), a.sum(1).long(), b.sum(1).long()


def _unpack(bits: Tensor) -> Tensor:
    """(N, W) int64 -> (N, 64 W) uint8 zeros and ones."""
    octets = bits.contiguous().view(torch.uint8).unsqueeze(-1)
    return ((octets >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1).flatten(1)


@_dispatch.register_fake("pack_masks")
def _fake_pack(masks: Tensor) -> Tensor:
    return masks.new_empty(masks.shape[0], (masks.shape[1] + 63) // 64, dtype=torch.int64)


@_dispatch.register_fake("mask_ratio")
def _fake_ratio(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.float32)


@_dispatch.register_fake("mask_iou")
def _fake_overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, M = a.shape[0], b.shape[0]
    return a.new_empty(N, M), a.new_empty(N), a.new_empty(M)
