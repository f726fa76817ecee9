# SPDX-License-Identifier: Apache-2.0
"""The transformer blocks that the query-based systems share: multi-head attention, feed-forward, small perceptrons."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.packed import Linear, packs
from pyvseg.ops import masked_attn


class Attention(nn.Module):
    """Multi-head attention with the parameters of `nn.MultiheadAttention`, on `scaled_dot_product_attention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, masks: Tensor | None = None, *, residual: Tensor | None = None) -> Tensor:
        """query (B, N, C), key and value (B, M, C) -> (B, N, C), plus `residual` of that shape.

        masks   (B, N, M) logits: where they are negative a query does not look, unless they are negative everywhere
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]
        out = self.out_proj(_attend(*projected, self.heads, masks))
        return out if residual is None else residual + out

    def for_inference(self) -> nn.Module:
        return _FastAttention(self)


class _FastAttention(nn.Module):
    """`Attention` with its three projections as modules of their own."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        self.q, self.k, self.v = (_linear(w, b) for w, b in zip(weights, biases))
        self.out_proj = Linear(attention.out_proj)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, masks: Tensor | None = None, *, residual: Tensor | None = None) -> Tensor:
        return self.out_proj(_attend(self.q(query), self.k(key), self.v(value), self.heads, masks), residual=residual)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, masks: Tensor | None) -> Tensor:
    if masks is not None:
        return masked_attn(q, k, v, masks, heads)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if q.dtype == torch.bfloat16 and packs(q, k):
        return torch.stack([_attend_by_products(*image) for image in zip(q, k, v)]).transpose(1, 2).flatten(2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(H, N, D) of one image. For bfloat16 on a CPU, where PyTorch's fused attention works in float32: half its time."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)).softmax(-1) @ v


def _linear(weight: Tensor, bias: Tensor) -> Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return Linear(linear)


class FeedForward(nn.Module):
    """norm(x + linear2(relu(linear1(x))))"""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(self.linear1(x).relu_()))

    def for_inference(self) -> nn.Module:
        return FastFeedForward(self.linear1, self.linear2, self.norm)


class FastFeedForward(nn.Module):
    """`FeedForward` of two layers and a norm; ReLU and addition happen inside the layers."""

    def __init__(self, linear1: nn.Linear, linear2: nn.Linear, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.linear1, self.linear2, self.norm = Linear(linear1), Linear(linear2), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear2(self.linear1(x, relu=True), residual=x))


class MLP(nn.Module):
    """`layers` linear layers with ReLU between them; none make it the identity."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int = 3) -> None:
        super().__init__()
        widths = [inputs, *[hidden] * (layers - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:])) if layers else nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x.relu_() if i else x)
        return x

    def for_inference(self) -> nn.Module:
        return _FastMLP(self)


class _FastMLP(nn.Module):
    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(layer) for layer in mlp.layers)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers, 1):
            x = layer(x, relu=i < len(self.layers))
        return x
