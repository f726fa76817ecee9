# SPDX-License-Identifier: Apache-2.0
"""Pre-activation residual blocks, and the form of them that shares work between objects."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.conv import fast_conv


def conv3x3(conv: nn.Module, x: Tensor, *, relu_input: bool = False, residual: Tensor | None = None) -> Tensor:
    """conv(relu(x)) + residual for an `nn.Conv2d` or for the fast module that replaces it at inference."""
    if not isinstance(conv, nn.Conv2d):
        return conv(x, relu_input=relu_input, residual=residual)
    y = conv(x.relu() if relu_input else x)
    return y if residual is None else y + residual


class ResBlock(nn.Module):
    """skip(x) + conv2(relu(conv1(relu(x)))), where skip is a 3x3 convolution if the width changes, else the identity."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.downsample = None if inputs == outputs else nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else conv3x3(self.downsample, x)
        return conv3x3(self.conv2, conv3x3(self.conv1, x, relu_input=True), relu_input=True, residual=skip)


class SplitConv3x3(nn.Module):
    """A 3x3 convolution over [object part, frame part] whose two halves can be computed apart: their sum is the result.

    The frame part is the same for every object, so it is computed once per frame.
    """

    def __init__(self, object_inputs: int, frame_inputs: int, outputs: int) -> None:
        super().__init__()
        whole = nn.Conv2d(object_inputs + frame_inputs, outputs, 3, padding=1)
        self.weight, self.bias, self.object_inputs = whole.weight, whole.bias, object_inputs

    def of_object(self, x: Tensor, *, relu_input: bool, residual: Tensor) -> Tensor:
        y = F.conv2d(x.relu() if relu_input else x, self.weight[:, : self.object_inputs], padding=1)
        return y + residual

    def of_frame(self, x: Tensor, *, relu_input: bool) -> Tensor:
        return F.conv2d(x.relu() if relu_input else x, self.weight[:, self.object_inputs :], self.bias, padding=1)

    def for_inference(self) -> nn.Module:
        return _FastSplitConv3x3(self)


class _FastSplitConv3x3(nn.Module):
    def __init__(self, split: SplitConv3x3) -> None:
        super().__init__()
        object_weight = split.weight[:, : split.object_inputs]
        self.object_conv = fast_conv(_conv(object_weight, None))
        self.frame_conv = fast_conv(_conv(split.weight[:, split.object_inputs :], split.bias))

    def of_object(self, x: Tensor, *, relu_input: bool, residual: Tensor) -> Tensor:
        return self.object_conv(x, relu_input=relu_input, residual=residual)

    def of_frame(self, x: Tensor, *, relu_input: bool) -> Tensor:
        return self.frame_conv(x, relu_input=relu_input)


def _conv(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=bias is not None, device="meta")
    conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv


class FusionBlock(nn.Module):
    """`ResBlock` over the concatenation [object part, frame part], with the frame part's share computed once per frame."""

    def __init__(self, object_inputs: int, frame_inputs: int, outputs: int) -> None:
        super().__init__()
        self.downsample = SplitConv3x3(object_inputs, frame_inputs, outputs)
        self.conv1 = SplitConv3x3(object_inputs, frame_inputs, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def of_frame(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms (B, outputs, h, w) that the frame part (B, frame_inputs, h, w) contributes for every object."""
        return self.conv1.of_frame(x, relu_input=True), self.downsample.of_frame(x, relu_input=False)

    def forward(self, x: Tensor, frame_terms: tuple[Tensor, Tensor]) -> Tensor:
        """(B, object_inputs, h, w) and the matching `of_frame` terms -> (B, outputs, h, w)."""
        inner = self.conv1.of_object(x, relu_input=True, residual=frame_terms[0])
        skip = self.downsample.of_object(x, relu_input=False, residual=frame_terms[1])
        return conv3x3(self.conv2, inner, relu_input=True, residual=skip)
