# SPDX-License-Identifier: Apache-2.0
"""Masked cross-attention (Cheng et al., Mask2Former, CVPR 2022): queries that look only where their mask is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg.ops import _dispatch

__all__ = ["masked_attn"]


def masked_attn(
    query: Tensor,  # (B, N, C), projected
    key: Tensor,  # (B, M, C)
    value: Tensor,  # (B, M, C)
    masks: Tensor,  # (B, N, M) logits
    heads: int,
    *,
    backend: str = "auto",
) -> Tensor:  # (B, N, C)
    """Multi-head attention of every query to the keys where its mask is not negative; to all keys where there are none.

    Head h has the channels from h * C / heads on; softmax is over query times key / sqrt(C / heads). Kernels take one dtype,
    float32, bfloat16 or float16, work in float32, and read keys and values only where some query looks. Gradients for
    query, key and value are those of the reference, which runs where one is asked for.

    Raises ValueError for shapes and devices, TypeError for dtypes, naming the argument.
    """
    choice = _plan(query, key, value, masks, heads, backend)
    if choice == "reference":
        return reference(query, key, value, masks, heads)
    return _dispatch.call(choice, "masked_attn", query, key, value, masks.detach(), heads)


def reference(query: Tensor, key: Tensor, value: Tensor, masks: Tensor, heads: int) -> Tensor:
    """The definition in PyTorch; one mask serves all heads."""
    closed = masks.detach() < 0
    zero, out = (torch.full((), x, dtype=query.dtype, device=query.device) for x in (0.0, -torch.inf))
    bias = torch.where(closed & ~closed.all(-1, keepdim=True), out, zero)[:, None]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


@_dispatch.planned
def _plan(query: Tensor, key: Tensor, value: Tensor, masks: Tensor, heads: int, backend: str) -> str:
    others = {"key": key, "value": value, "masks": masks}
    for name, t in {"query": query, **others}.items():
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
        if t.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {t.dtype}")
        if t.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {t.device}")
        if t.ndim != 3:
            raise ValueError(f"{name} must have three dimensions, got shape {tuple(t.shape)}")
    B, N, C = query.shape
    M = key.shape[1]
    for name, shape in {"key": (B, M, C), "value": (B, M, C), "masks": (B, N, M)}.items():
        if others[name].shape != shape:
            raise ValueError(f"{name} must be {shape} beside query {tuple(query.shape)} and {M} keys, got {tuple(others[name].shape)}")
    if not isinstance(heads, int) or heads < 1 or C % heads:
        raise ValueError(f"heads must divide the {C} channels, got {heads}")
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if wanted or 0 in (query.numel(), key.numel()) or (backend == "auto" and query.device.type != "cpu"):
        return "reference"
    return _dispatch.choose("masked_attn", backend, query, slower="3 times")


@_dispatch.register_fake("masked_attn")
def _fake(query: Tensor, key: Tensor, value: Tensor, masks: Tensor, heads: int) -> Tensor:
    return query.new_empty(query.shape)
