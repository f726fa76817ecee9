# SPDX-License-Identifier: Apache-2.0
"""Blocks of EfficientNet-Lite0 at 384 x 688, against the three convolutions one after the other."""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from benchmarks.harness import Case, on_gpu
from pyvseg.ops import inverted_residual, inverted_residual_weight


def case(I: int, C: int, O: int, kernel: int, stride: int, H: int, W: int) -> Case:
    x = torch.randn(1, I, H, W).contiguous(memory_format=torch.channels_last)
    shapes = ((C, I, 1, 1), (C, 1, kernel, kernel), (O, C, 1, 1))
    weights = [((torch.randn(shape) / 3).contiguous(memory_format=torch.channels_last), torch.randn(shape[0])) for shape in shapes]
    prepared, residual, padding = inverted_residual_weight(*weights), stride == 1 and I == O, kernel // 2  # not TensorFlow's; as much work

    def three() -> torch.Tensor:
        y = F.relu6(F.conv2d(x, *weights[0]), inplace=True)
        y = F.relu6(F.conv2d(y, *weights[1], stride, padding, groups=C), inplace=True)
        y = F.conv2d(y, *weights[2])
        return y.add_(x) if residual else y

    ways = {
        "three convolutions (oneDNN), channels last": torch.inference_mode()(three),
        "pyvseg": torch.inference_mode()(lambda: inverted_residual(x, prepared, stride=stride, residual=residual)),
    }
    after = H * W // stride**2
    operations = 2.0 * C * (H * W * I + after * (kernel**2 + O))
    name = f"{I} -> {C} -> {O} channels, {kernel} x {kernel}, stride {stride}, {H} x {W}"
    return Case("inverted_residual", name, ways, 4.0 * (H * W * I + after * O), operations)


def cases(quick: bool) -> Iterator[Case]:
    if on_gpu():
        return  # cuDNN serves there
    yield case(16, 96, 24, 3, 2, 192, 344)
    yield case(24, 144, 24, 3, 1, 96, 172)
    if quick:
        return
    yield case(24, 144, 40, 5, 2, 96, 172)
    yield case(112, 672, 112, 5, 1, 24, 43)
