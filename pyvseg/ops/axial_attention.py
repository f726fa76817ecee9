# SPDX-License-Identifier: Apache-2.0
"""Self-attention along the rows or columns of a map, with learned vectors for distances (Wang et al., Axial-DeepLab, ECCV 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvseg.ops import _dispatch

__all__ = ["axial_attention"]


def axial_attention(
    qkv: Tensor,  # (B, H, W, heads * (2 K + V)): queries, keys and values, the heads of each side by side
    query_table: Tensor,  # (2 R + 1, K): for the distances -R to R from a query to a key
    key_table: Tensor,  # (2 R + 1, K)
    value_table: Tensor,  # (2 R + 1, V)
    scales: Tensor,  # (3, heads): of the products of queries and keys, queries and table, keys and table
    value_scale: Tensor,  # (heads, V): of what is read from the table
    axis: int,  # 1: within columns, 2: within rows
    *,
    backend: str = "auto",
) -> Tensor:  # (B, H, W, heads * V)
    """The similarity of query l and key m of a column or row is the sum of three products, each with the scale of its head: q_l . k_m,
    q_l . query_table[m - l] and k_m . key_table[m - l]. Softmax over m weighs v_m + value_scale * value_table[m - l].

    Nothing is divided by the square root of the depth. float32, bfloat16 or float16, all of one dtype; computed in float32.
    Any strides. Where a gradient is needed the PyTorch reference runs. Columns or rows longer than R + 1 have no distances.

    Raises ValueError for shapes and devices, TypeError for dtypes, naming the argument.
    """
    tensors = qkv, query_table, key_table, value_table, scales, value_scale
    choice = _plan(*tensors, axis, backend)
    if choice == "empty":
        return qkv.new_empty(*qkv.shape[:3], value_scale.numel())
    return reference(*tensors, axis) if choice == "reference" else _dispatch.call(choice, "axial_attention", *tensors, axis)


def reference(
    qkv: Tensor, query_table: Tensor, key_table: Tensor, value_table: Tensor, scales: Tensor, value_scale: Tensor, axis: int
) -> Tensor:
    """The definition in PyTorch."""
    if axis == 1:
        return reference(qkv.transpose(1, 2), query_table, key_table, value_table, scales, value_scale, 2).transpose(1, 2)
    B, S, L, _ = qkv.shape
    heads, depth = scales.shape[1], query_table.shape[1]
    place = torch.arange(L, device=qkv.device)
    distance = place - place[:, None] + len(query_table) // 2  # as a row of the tables, for query l and key m
    parts = qkv.split((heads * depth, heads * depth, value_scale.numel()), -1)
    q, k, v = (part.reshape(B * S, L, heads, part.shape[3] // heads) for part in parts)
    by_head = lambda t: t.transpose(1, 2).reshape(B * S * heads, L, t.shape[3])  # noqa: E731
    by_place = lambda t: t.transpose(0, 1).reshape(L, B * S * heads, t.shape[3])  # noqa: E731
    content, of_queries, of_keys = scales[..., None]
    similarity = by_head(q * content) @ by_head(k).mT
    similarity = similarity + (by_place(q * of_queries) @ query_table[distance].mT).transpose(0, 1)
    similarity = similarity + (by_place(k * of_keys) @ key_table[distance.T].mT).permute(1, 2, 0)
    weight = similarity.softmax(-1)
    found = (weight @ by_head(v)).view(B, S, heads, L, -1).transpose(2, 3)
    position = (weight.transpose(0, 1) @ value_table[distance]).view(L, B, S, heads, -1).permute(1, 2, 0, 3, 4)
    return torch.addcmul(found, position, value_scale).flatten(3)


@_dispatch.planned
def _plan(
    qkv: Tensor, query_table: Tensor, key_table: Tensor, value_table: Tensor, scales: Tensor, value_scale: Tensor, axis: int, backend: str
) -> str:
    tensors = {"qkv": qkv, "query_table": query_table, "key_table": key_table, "value_table": value_table, "scales": scales, "value_scale": value_scale}
    for name, t in tensors.items():
        dims = 4 if name == "qkv" else 2
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if not t.is_floating_point() or t.dtype != qkv.dtype:
            raise TypeError(f"{name} must be floating point and of qkv's dtype, got {t.dtype}")
        if t.ndim != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(t.shape)}")
        if t.device != qkv.device:
            raise ValueError(f"{name} is on {t.device} but qkv on {qkv.device}")
    if axis not in (1, 2):
        raise ValueError(f"axis must be 1 or 2, got {axis!r}")
    (rows, depth), heads, width = query_table.shape, scales.shape[1], value_table.shape[1]
    if rows % 2 == 0:
        raise ValueError(f"query_table must have an odd number of rows, got shape {tuple(query_table.shape)}")
    expected = {"key_table": (rows, depth), "value_table": (rows, width), "scales": (3, heads), "value_scale": (heads, width)}
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensors[name].shape)}")
    if qkv.shape[3] != heads * (2 * depth + width):
        raise ValueError(f"qkv must have {heads} heads of {depth} + {depth} + {width} channels, got shape {tuple(qkv.shape)}")
    if qkv.shape[axis] > rows // 2 + 1:
        raise ValueError(f"qkv must have at most {rows // 2 + 1} positions along axis {axis}, as the tables have, got shape {tuple(qkv.shape)}")
    if 0 in qkv.shape[:3] or value_scale.numel() == 0:
        return "empty"
    choice = _dispatch.choose("axial_attention", backend, *tensors.values(), slower="4 times")
    return "reference" if torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()) else choice


@_dispatch.register_fake("axial_attention")
def _fake(
    qkv: Tensor, query_table: Tensor, key_table: Tensor, value_table: Tensor, scales: Tensor, value_scale: Tensor, axis: int
) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], value_scale.numel())
