# SPDX-License-Identifier: Apache-2.0
"""The 3x3 convolutions of PCVOS and STCN at 480p. FLOP count those of a direct convolution, for every way: a share of the
roofline above 100 % is arithmetic saved."""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from benchmarks.harness import Case, on_gpu
from pyvseg.ops import conv3x3, conv3x3_weight


def case(where: str, N: int, I: int, O: int, H: int, W: int, bar: float | None) -> Case:
    x = torch.randn(N, I, H, W).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(O, I, 3, 3) / (3 * I**0.5)).contiguous(memory_format=torch.channels_last)
    bias, prepared = torch.randn(O), conv3x3_weight(weight)
    ways = {
        "conv2d (oneDNN), channels last": torch.inference_mode()(lambda: F.conv2d(x, weight, bias, padding=1)),
        "pyvseg": torch.inference_mode()(lambda: conv3x3(x, prepared, bias)),
    }
    bars = {("pyvseg", "conv2d (oneDNN), channels last"): bar} if bar else {}
    name = f"{where}, {N} x {I} -> {O} channels, {H} x {W}"
    return Case("conv3x3", name, ways, 4.0 * (x.numel() + weight.numel() + N * O * H * W), 18.0 * N * I * O * H * W, bars=bars)


def cases(quick: bool) -> Iterator[Case]:
    if on_gpu():
        return  # cuDNN serves there
    yield case("decoder, stride 16", 1, 512, 512, 30, 54, 2.5)
    yield case("decoder, stride 8", 1, 512, 512, 60, 108, 2.5)
    yield case("decoder, stride 4", 1, 256, 256, 120, 216, 2.5)
    if quick:
        return
    yield case("thin features", 1, 1024, 512, 30, 54, 2.5)
    yield case("decoder, stride 16, 5 frames", 5, 512, 512, 30, 54, 2.5)
    yield case("decoder, stride 8", 1, 512, 256, 60, 108, 2.5)
    yield case("decoder, stride 8", 1, 256, 256, 60, 108, 2.2)
    yield case("ResNet, stride 8", 1, 128, 128, 60, 108, 2)
    yield case("ResNet, stride 4", 1, 64, 64, 120, 216, 1.5)
