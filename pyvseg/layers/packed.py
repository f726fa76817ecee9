# SPDX-License-Identifier: Apache-2.0
"""What is made of weights once and kept for inference: oneDNN's packed form on a CPU, with ReLU and additions in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Packed(nn.Module):
    """A module that makes other forms of its weights when it first needs them, and keeps the last few. Change the weights
    afterwards only by `load_state_dict`, `to` or the like."""

    KEPT = 4

    def __init__(self) -> None:
        super().__init__()
        self.packed: dict[Hashable, object] = {}

    def prepared(self, key: Hashable, make: Callable[[], object]) -> object:
        """What `make()` gave when this key came first."""
        if key not in self.packed:
            made = make()
            while len(self.packed) >= self.KEPT:
                del self.packed[next(iter(self.packed))]
            self.packed[key] = made
        return self.packed[key]

    def _apply(self, *args, **kwargs) -> nn.Module:
        self.packed = {}
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args) -> None:
        self.packed = {}
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "packed": {}}  # oneDNN's tensors cannot be copied or pickled


class Linear(Packed):
    """`nn.Linear` for inference: on a CPU by oneDNN, whose float32 kernels are about twice as fast as the matrix library
    behind `F.linear` on current AMD processors and no slower elsewhere."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor, *, relu: bool = False, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        """(..., I) -> (..., O): the layer, with ReLU, with GELU, or plus `residual` (..., O); one of them at most."""
        if not packs(x, self.weight):
            y = F.linear(x, self.weight, self.bias)
            y = y.relu() if relu else F.gelu(y) if gelu else y
            return y if residual is None else y + residual
        packed = self.prepared("linear", lambda: torch.ops.mkldnn._reorder_linear_weight(self.weight, x.numel() // self.in_features))
        if residual is not None:
            return _linear().binary(x.contiguous(), residual.contiguous(), packed, self.bias, "add")
        act = "relu" if relu else "gelu" if gelu else "none"
        return _linear().default(x.contiguous(), packed, self.bias, act, [], "none" if gelu else "")


def products(rows: Tensor, columns: Tensor) -> Tensor:
    """(B, N, C) @ (B, C, M) -> (B, N, M), fast where `columns` holds transposed rows: maps that are channels last in memory."""
    if not packs(rows, columns):
        return rows @ columns
    results = [_linear().default(r.contiguous(), c.T.contiguous(), None, "none", [], "") for r, c in zip(rows, columns)]
    return torch.stack(results) if len(results) > 1 else results[0][None]


def _linear():
    """Call its overloads by name: choosing between them PyTorch reads the bias element by element, which takes a millisecond."""
    return torch.ops.mkldnn._linear_pointwise


def packs(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's packed kernels serve this input: on the CPU, float32 or bfloat16 that the processor knows, no gradient."""
    if not x.device.type == weight.device.type == "cpu" or x.dtype != weight.dtype or x.numel() == 0:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if not torch.backends.mkldnn.is_available() or torch.compiler.is_compiling():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_conv(conv: nn.Conv2d, size: torch.Size, others: Iterable[Tensor] = ()) -> Tensor:
    """The weight of a convolution for inputs of this size; one of `others`, packed before, where it is laid out
    alike. For an input of another size oneDNN may lay it out anew at every call, which can take three times the convolution."""
    weight = conv.weight.contiguous().to_mkldnn()
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, conv.padding, conv.stride, conv.dilation, conv.groups, list(size))
    layout = torch.ops.mkldnn._get_mkldnn_serialized_md
    return next((other for other in others if torch.equal(layout(other), layout(packed))), packed)


def packed_conv(conv: nn.Conv2d, packed: Tensor, x: Tensor, residual: Tensor | None, act: str = "none") -> Tensor:
    """conv(x) + residual, then `act`: "none", "relu" or, without a residual, "gelu" or "relu6"."""
    residual = residual if residual is None else residual.contiguous(memory_format=torch.channels_last)
    geometry, convolution = (conv.padding, conv.stride, conv.dilation, conv.groups), torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        act, bounds = ("hardtanh", [0.0, 6.0]) if act == "relu6" else (act, [])
        return convolution.default(x, packed, conv.bias, *geometry, act, bounds, "none" if act == "gelu" else "")
    return convolution.binary(x, residual, packed, conv.bias, *geometry, "add", 1.0, None if act == "none" else act, [], None)
