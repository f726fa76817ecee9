# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0 trunk (Tan & Le, 2019; Lite: no squeeze-excite, ReLU6), down to stride 16."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

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
        y = F.relu6(self.bn0(self.conv0(x)), inplace=True) if hasattr(self, "conv0") else x
        y = F.relu6(self.bn1(self.conv1(y)), inplace=True)
        y = self.bn2(self.conv2(y))
        return y + x if self.residual else y


class EfficientNetLite0(nn.Module):
    """forward takes (B, inputs, H, W), sides multiples of 16, and returns maps at strides 4, 8, 16 with 24, 40, 112 channels."""

    channels = tuple(_BLOCKS[i][3] for i in _STAGE_ENDS)

    def __init__(self, *, inputs: int = 3) -> None:
        super().__init__()
        self.conv = SameConv2d(inputs, 32, 3, 2)
        self.bn = nn.BatchNorm2d(32, eps=1e-3)
        before = (32, *(b[3] for b in _BLOCKS))
        self.blocks = nn.ModuleList(InvertedResidual(before[i], *b) for i, b in enumerate(_BLOCKS))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu6(self.bn(self.conv(x)), inplace=True)
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in _STAGE_ENDS:
                features.append(x)
        return features
