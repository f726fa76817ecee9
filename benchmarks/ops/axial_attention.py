# SPDX-License-Identifier: Apache-2.0
"""The axial attention of kMaX-DeepLab's pixel decoder at stride 16, from queries, keys and values on: frames of 897 x 1601 and 481 x 865."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, on_gpu
from pyvseg.ops import axial_attention
from pyvseg.ops.axial_attention import reference

HEADS, KEY, VALUE, REACH = 8, 32, 64, 254


def published(qkv: Tensor, tables: list[Tensor], scales: Tensor, value_scale: Tensor) -> Tensor:
    """Along rows: products by einsum, all three side by side through a batch norm, what is read through another."""
    parts = qkv.split((HEADS * KEY, HEADS * KEY, HEADS * VALUE), -1)
    q, k, v = (part.unflatten(-1, (HEADS, -1)).flatten(0, 1) for part in parts)  # (S, L, heads, depth)
    place = torch.arange(qkv.shape[2])
    to_queries, to_keys, to_values = (table[place - place[:, None] + REACH] for table in tables)
    products = [torch.einsum("slhd,smhd->shlm", q, k), torch.einsum("slhd,lmd->shlm", q, to_queries), torch.einsum("smhd,lmd->shlm", k, to_keys)]
    together = torch.cat(products, 1)
    zeros, ones = torch.zeros(3 * HEADS), torch.ones(3 * HEADS)
    weight = F.batch_norm(together, zeros, ones, scales.flatten(), zeros).unflatten(1, (3, HEADS)).sum(1).softmax(-1)
    content, position = torch.einsum("shlm,smhd->shdl", weight, v), torch.einsum("shlm,lmd->shdl", weight, to_values)
    both = torch.cat([content, position], 1).flatten(1, 2)
    factors = torch.cat([torch.ones(HEADS * VALUE), value_scale.flatten()])
    zeros, ones = torch.zeros(2 * HEADS * VALUE), torch.ones(2 * HEADS * VALUE)
    return F.batch_norm(both, zeros, ones, factors, zeros).unflatten(1, (2, -1)).sum(1).mT.unflatten(0, qkv.shape[:2])


@torch.inference_mode()
def case(B: int, H: int, W: int, axis: int) -> Case:
    qkv, tables = torch.randn(B, H, W, HEADS * (2 * KEY + VALUE)), [torch.randn(2 * REACH + 1, depth) for depth in (KEY, KEY, VALUE)]
    scales, value_scale = torch.randn(3, HEADS) / KEY**0.5, torch.randn(HEADS, VALUE)
    turned = qkv if axis == 2 else qkv.transpose(1, 2).contiguous()
    given = *tables, scales, value_scale
    halves = [t.bfloat16() for t in (qkv, *given)]
    ways = {
        "einsum, batch norms": lambda: published(turned, tables, scales, value_scale),
        "batched products": lambda: reference(qkv, *given, axis),
        "pyvseg": lambda: axial_attention(qkv, *given, axis),
        "pyvseg bfloat16": lambda: axial_attention(*halves, axis),
    }
    ways = {name: torch.inference_mode()(run) for name, run in ways.items()}
    length = qkv.shape[axis]
    pairs = B * H * W * length * HEADS
    bars = {("pyvseg", "einsum, batch norms"): 4.0}
    name = f"{B} x {H} x {W}, along {'columns' if axis == 1 else 'rows'}"
    return Case("axial_attention", name, ways, 4.0 * (qkv.numel() + B * H * W * HEADS * VALUE), 2.0 * pairs * (3 * KEY + 2 * VALUE), bars=bars)


def cases(quick: bool) -> Iterator[Case]:
    if on_gpu():
        return  # plain PyTorch serves there
    yield case(1, 31, 55, 1)
    yield case(1, 31, 55, 2)
    if quick:
        return
    yield case(1, 57, 101, 1)
    yield case(1, 57, 101, 2)
