# SPDX-License-Identifier: Apache-2.0
"""Convolutions for inference."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.packed import Packed, pack_conv, packed_conv, packs
from pyvseg.layers.transfer import on_gpu
from pyvseg.ops import conv3x3, conv3x3_weight
from pyvseg.ops._dispatch import choose

FEW_OUTPUTS = 2  # up to so many, nine 1x1 convolutions at once are faster than one 3x3
MANY_CHANNELS = 24  # from so many on, our kernel is faster than oneDNN, in bfloat16 too, though it multiplies in float32; not where there is AMX


def fast_conv(conv: nn.Conv2d) -> nn.Module:
    """A module with forward(x, *, relu_input=False, residual=None, relu=False, gelu=False) = conv(relu(x) if relu_input else x) +
    residual, then ReLU where `relu`, GELU where `gelu`.

    Takes a fast way on the CPU when `conv` has no groups and no gradient is asked for: our kernel for 3x3, stride,
    padding and dilation 1, where the size makes it pay, else oneDNN with the weight packed. `conv` itself serves everything
    else. The weight is transformed at the first such call, for oneDNN at the first of each size: see `layers.packed.Packed`.
    """
    return _FastConv(conv)


class _FastConv(Packed):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    @property
    def weight(self) -> Tensor:
        return self.conv.weight

    @property
    def bias(self) -> Tensor | None:
        return self.conv.bias

    def forward(
        self, x: Tensor, *, relu_input: bool = False, residual: Tensor | None = None, relu: bool = False, gelu: bool = False
    ) -> Tensor:
        way = self._way(x)
        prepared = self.prepared((way, x.shape if way == "packed" else None), lambda: self._prepare(way, x))
        if way == "winograd":
            weight, bias = prepared
            return _activated(conv3x3(x, weight, bias, relu_input=relu_input, residual=residual), relu, gelu)
        x = x.relu() if relu_input else x
        if way == "packed":
            if gelu and residual is not None:
                return F.gelu(packed_conv(self.conv, prepared, x, residual))
            return packed_conv(self.conv, prepared, x, residual, "gelu" if gelu else "relu" if relu else "none")
        if way == "gpu":
            return _activated(self._on_gpu(x, residual, relu), False, gelu)
        y = self.conv(x) if way is None else _sum_of_taps(prepared(x), self.conv.bias)
        y = y if residual is None else y.add_(residual)
        return _activated(y, relu, gelu)

    def _on_gpu(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        """PyTorch's convolution, and what follows it in one pass."""
        from pyvseg.kernels.conv_end import conv_end

        conv = self.conv
        y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups).contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.expand_as(y).contiguous(memory_format=torch.channels_last)
        return conv_end(y, conv.bias, residual, relu) if relu or residual is not None or conv.bias is not None else y

    def _prepare(self, way: str | None, x: Tensor) -> object:
        if way == "taps":
            return _FastConv(_tap_conv(self.conv.weight))
        if way == "winograd":
            return conv3x3_weight(self.conv.weight), None if self.conv.bias is None else self.conv.bias.float()
        if way == "packed":
            return pack_conv(self.conv, x.shape, [packed for (way, _), packed in self.packed.items() if way == "packed"])
        return None

    def _way(self, x: Tensor) -> str | None:
        """"winograd", "taps", "packed", "gpu", or None for the convolution itself. Measured on two cores with AVX-512."""
        conv = self.conv
        if _ends_in_triton(x, conv.weight) and conv.padding_mode == "zeros":
            return "gpu"
        if x.ndim != 4 or conv.groups > 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str) or not packs(x, conv.weight):
            return None
        positions = x.shape[0] * x.shape[2] * x.shape[3]
        if positions < 64 or not _is_plain(conv):
            return "packed"
        if x.dtype == torch.float32 and conv.out_channels <= FEW_OUTPUTS and conv.in_channels >= 32:
            return "taps"
        amx = x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
        if min(conv.in_channels, conv.out_channels) < MANY_CHANNELS or amx or choose("conv3x3", "auto", x, slower="3 times") != "cpu":
            return "packed"
        return "winograd"


def _ends_in_triton(x: Tensor, weight: Tensor) -> bool:
    """Whether bias, addition and ReLU go into one kernel: on a GPU, where no gradient is asked for."""
    if not on_gpu(x.device) or x.ndim != 4 or x.dtype != weight.dtype or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _activated(y: Tensor, relu: bool, gelu: bool) -> Tensor:
    return y.relu_() if relu else F.gelu(y) if gelu else y


def _is_plain(conv: nn.Conv2d) -> bool:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def _tap_conv(weight: Tensor) -> nn.Conv2d:
    """Of a kernel (O, I, 3, 3): a 1x1 convolution whose 9 O outputs are its taps, mirrored, for `_sum_of_taps`."""
    taps = nn.Conv2d(weight.shape[1], 9 * weight.shape[0], 1, bias=False, device="meta")
    taps.weight = nn.Parameter(weight.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, weight.shape[1], 1, 1), requires_grad=False)
    return taps


def _sum_of_taps(products: Tensor, bias: Tensor | None) -> Tensor:
    """Every input position adds its nine products to the outputs around it: the input is read once instead of nine times."""
    y = F.fold(products.flatten(2), products.shape[2:], kernel_size=3, padding=1)
    return y if bias is None else y.add_(bias[:, None, None])
