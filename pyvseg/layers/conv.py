# SPDX-License-Identifier: Apache-2.0
"""3x3 convolutions for inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.ops import conv3x3, conv3x3_weight
from pyvseg.ops._dispatch import choose

FEW_OUTPUTS = 2  # up to so many, nine 1x1 convolutions at once are faster than one 3x3


def fast_conv3x3(conv: nn.Conv2d) -> nn.Module:
    """A module with forward(x, *, relu_input=False, residual=None) = conv(relu(x) if relu_input else x) + residual.

    Takes the fast way for float32 on the CPU when `conv` is 3x3 of stride, padding and dilation 1 without groups, no
    gradient is asked for, and the size makes it pay; `conv` itself serves everything else. The weight is transformed at
    the first such call: change it afterwards only by `load_state_dict`, `to` or the like.
    """
    return _FastConv3x3(conv)


class _FastConv3x3(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self._prepared = None

    def forward(self, x: Tensor, *, relu_input: bool = False, residual: Tensor | None = None) -> Tensor:
        way = self._way(x)
        if way is not None and self._prepared is None:
            self._prepared = _tap_weight(self.conv.weight) if way == "taps" else conv3x3_weight(self.conv.weight)
        if way == "winograd":
            return conv3x3(x, self._prepared, self.conv.bias, relu_input=relu_input, residual=residual)
        x = x.relu() if relu_input else x
        y = self.conv(x) if way is None else _sum_of_taps(x, self._prepared, self.conv.bias)
        return y if residual is None else y.add_(residual)

    def _way(self, x: Tensor) -> str | None:
        """"winograd", "taps", or None for the convolution itself. Measured on two cores with AVX-512."""
        weight = self.conv.weight
        if x.device.type != "cpu" or weight.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
            return None
        if x.ndim != 4 or not _is_plain(self.conv) or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
            return None
        positions = x.shape[0] * x.shape[2] * x.shape[3]
        if self.conv.out_channels <= FEW_OUTPUTS:
            return "taps" if self.conv.in_channels >= 64 and positions >= 64 else None
        if min(self.conv.in_channels, self.conv.out_channels) < 32 or positions < 64:
            return None
        return "winograd" if choose("conv3x3", "auto", x, slower="3 times") == "cpu" else None

    def _apply(self, *args, **kwargs) -> nn.Module:
        self._prepared = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args)


def _is_plain(conv: nn.Conv2d) -> bool:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def _tap_weight(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) -> (9 O, I, 1, 1): the kernel's nine taps as outputs, mirrored, for `_sum_of_taps`."""
    return weight.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, weight.shape[1], 1, 1)


def _sum_of_taps(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Every input position adds its nine products to the outputs around it. Reads x once instead of nine times."""
    y = F.fold(F.conv2d(x, taps).flatten(2), x.shape[2:], kernel_size=3, padding=1)
    return y if bias is None else y.add_(bias[:, None, None])
