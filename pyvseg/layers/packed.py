# SPDX-License-Identifier: Apache-2.0
"""What is made of weights once and kept for inference: oneDNN's packed form on a CPU, with ReLU and additions in the same pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Packed(nn.Module):
    """A module that makes `packed` of its weights at the first call. Change them afterwards only by `load_state_dict`, `to` or the like."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = None

    def _apply(self, *args, **kwargs) -> nn.Module:
        self.packed = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args) -> None:
        self.packed = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "packed": None}  # oneDNN's tensors cannot be copied or pickled


class Linear(Packed):
    """`nn.Linear` for inference: on a CPU by oneDNN, whose float32 kernels are about twice as fast as the matrix library
    behind `F.linear` on current AMD processors and no slower elsewhere."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """(..., I) -> (..., O): the layer, with ReLU, or plus `residual` (..., O); not both."""
        if not packs(x, self.weight):
            y = F.linear(x, self.weight, self.bias)
            return y.relu() if relu else y if residual is None else y + residual
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, x.numel() // self.in_features)
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise(x.contiguous(), residual.contiguous(), self.packed, self.bias, "add")
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.packed, self.bias, "relu" if relu else "none", [], "")


def products(rows: Tensor, columns: Tensor) -> Tensor:
    """(B, N, C) @ (B, C, M) -> (B, N, M), fast where `columns` holds transposed rows: maps that are channels last in memory."""
    if not packs(rows, columns):
        return rows @ columns
    results = [torch.ops.mkldnn._linear_pointwise(r.contiguous(), c.T.contiguous(), None, "none", [], "") for r, c in zip(rows, columns)]
    return torch.stack(results) if len(results) > 1 else results[0][None]


def packs(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's packed kernels serve this input: on the CPU, float32 or bfloat16 that the processor knows, no gradient."""
    if not x.device.type == weight.device.type == "cpu" or x.dtype != weight.dtype or x.numel() == 0:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if not torch.backends.mkldnn.is_available() or torch.compiler.is_compiling():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_conv(conv: nn.Conv2d, size: torch.Size) -> Tensor:
    """The weight of a convolution without groups for inputs of about this size."""
    weight = conv.weight.contiguous().to_mkldnn()
    return torch._C._nn.mkldnn_reorder_conv2d_weight(weight, conv.padding, conv.stride, conv.dilation, 1, list(size))


def packed_conv(conv: nn.Conv2d, packed: Tensor, x: Tensor, residual: Tensor | None, act: str = "none") -> Tensor:
    """conv(x) + residual, then `act`: "none", "relu" or, without a residual, "gelu"."""
    residual = residual if residual is None else residual.contiguous(memory_format=torch.channels_last)
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    if residual is None:
        return torch.ops.mkldnn._convolution_pointwise(x, packed, conv.bias, *geometry, act, [], "none" if act == "gelu" else "")
    return torch.ops.mkldnn._convolution_pointwise(x, residual, packed, conv.bias, *geometry, "add", 1.0, None if act == "none" else act, [], None)
