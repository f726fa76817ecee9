# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0 trunk (Tan & Le, 2019; Lite: no squeeze-excite, ReLU6), down to stride 16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.packed import Packed, pack_conv, packed_conv, packs
from pyvseg.ops import InvertedResidualWeight, inverted_residual, inverted_residual_weight
from pyvseg.ops._dispatch import choose

# (expansion, kernel, stride, output channels) of each inverted residual block, in order; the blocks below stride 16 are left out.
_BLOCKS = (
    (1, 3, 1, 16),
    (6, 3, 2, 24), (6, 3, 1, 24),
    (6, 5, 2, 40), (6, 5, 1, 40),
    (6, 3, 2, 80), (6, 3, 1, 80), (6, 3, 1, 80),
    (6, 5, 1, 112), (6, 5, 1, 112), (6, 5, 1, 112),
)  # fmt: skip
_STAGE_ENDS = (2, 4, 10)  # the last block at strides 4, 8 and 16


class SameConv2d(nn.Conv2d):
    """Convolution without bias whose output has ceil(size / stride) cells.

    TensorFlow's rule: an odd number of padding cells puts the extra one at the bottom and right.
    Written for sizes that are multiples of the stride, where the amount does not depend on the size.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, 0 if stride > 1 else kernel // 2, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] > 1:
            total = self.kernel_size[0] - self.stride[0]
            x = F.pad(x, (total // 2, total - total // 2) * 2)
        return super().forward(x)

    def for_inference(self) -> nn.Module:
        return _FastSameConv2d(self)


class _FastSameConv2d(Packed):
    """The same convolution; on a CPU by oneDNN, with its weight packed and ReLU6 or an addition in the same pass."""

    def __init__(self, conv: SameConv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, *, relu6: bool = False, residual: Tensor | None = None) -> Tensor:
        if not packs(x, self.conv.weight):
            y = self.conv(x)
            y = y if residual is None else y + residual
            return F.relu6(y, inplace=True) if relu6 else y
        symmetric, packed = self.prepared(x.shape, lambda: self._prepare(x.shape))
        return packed_conv(symmetric, packed, x, residual, "relu6" if relu6 else "none")

    def _prepare(self, size: torch.Size) -> tuple[nn.Conv2d, Tensor]:
        """With a stride: zero taps before the others make the padding equal on all sides, so that nothing is copied to pad it."""
        conv, strided = self.conv, int(self.conv.stride[0] > 1)
        kernel = conv.kernel_size[0] + strided
        same = nn.Conv2d(conv.in_channels, conv.out_channels, kernel, conv.stride, (kernel - 1) // 2, groups=conv.groups, device="meta")
        same.weight, same.bias = nn.Parameter(F.pad(conv.weight, (strided, 0, strided, 0)), requires_grad=False), conv.bias
        return same, pack_conv(same, size)


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, expansion: int, kernel: int, stride: int, outputs: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        if expansion > 1:
            self.conv0 = SameConv2d(inputs, width, 1)
            self.bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self.conv1 = SameConv2d(width, width, kernel, stride, groups=width)
        self.bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self.conv2 = SameConv2d(width, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = _relu6(self.conv0, self.bn0, x) if hasattr(self, "conv0") else x
        y = _relu6(self.conv1, self.bn1, y)
        if isinstance(self.conv2, _FastSameConv2d):
            return self.conv2(y, residual=x if self.residual else None)
        y = self.bn2(self.conv2(y))
        return y + x if self.residual else y

    def for_inference(self) -> nn.Module:
        """Of a block whose batch norms have been folded."""
        return _FastInvertedResidual(self)


class _FastInvertedResidual(Packed):
    """In float32 on a CPU as one op, which keeps the expanded map out of memory."""

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        if x.dtype != torch.float32 or not packs(x, block.conv1.conv.weight) or choose("inverted_residual", "auto", x, slower="3 times") != "cpu":
            return block(x)
        weight = self.prepared("weight", self._weight)
        return inverted_residual(x, weight, stride=block.conv1.conv.stride[0], residual=block.residual)

    def _weight(self) -> InvertedResidualWeight:
        convs = [getattr(self.block, name).conv if hasattr(self.block, name) else None for name in ("conv0", "conv1", "conv2")]
        return inverted_residual_weight(*(conv and (conv.weight, conv.bias) for conv in convs))


def _relu6(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """The norm is folded into a fast convolution."""
    return conv(x, relu6=True) if isinstance(conv, _FastSameConv2d) else F.relu6(norm(conv(x)), inplace=True)


class EfficientNetLite0(nn.Module):
    """forward takes (B, inputs, H, W), sides multiples of 16, and returns maps at strides 4, 8, 16 with 24, 40, 112 channels."""

    channels = tuple(_BLOCKS[i][3] for i in _STAGE_ENDS)
    widest = 4 * 6 * 16  # channels that the largest map inside would have at stride 4: it has stride 2

    def __init__(self, *, inputs: int = 3) -> None:
        super().__init__()
        self.conv = SameConv2d(inputs, 32, 3, 2)
        self.bn = nn.BatchNorm2d(32, eps=1e-3)
        before = (32, *(b[3] for b in _BLOCKS))
        self.blocks = nn.ModuleList(InvertedResidual(before[i], *b) for i, b in enumerate(_BLOCKS))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = _relu6(self.conv, self.bn, x)
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in _STAGE_ENDS:
                features.append(x)
        return features
