# SPDX-License-Identifier: Apache-2.0
"""Inverted residual block for inference (MobileNetV2, Sandler et al., 2018): the many channels in its middle never reach memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg.ops import _dispatch

__all__ = ["InvertedResidualWeight", "inverted_residual", "inverted_residual_weight"]

CHUNK = 16  # channels of the middle are padded to a multiple of it
MOST_ROWS = 16  # of a depthwise kernel


class InvertedResidualWeight(NamedTuple):
    """The weights of a block, laid out by `inverted_residual_weight`; float32, zeros in the padding."""

    expand: Tensor | None  # (C / 16, I, 16)
    expand_bias: Tensor | None  # (C,)
    taps: Tensor  # (k, k, C)
    taps_bias: Tensor  # (C,)
    project: Tensor  # (ceil(O / 16), C, 16)
    project_bias: Tensor  # (16 ceil(O / 16),)
    outputs: int  # O


def inverted_residual_weight(
    expand: tuple[Tensor, Tensor] | None,  # (C, I, 1, 1), (C,); None: the block begins with its depthwise convolution
    depthwise: tuple[Tensor, Tensor],  # (C, 1, k, k), (C,)
    project: tuple[Tensor, Tensor],  # (O, C, 1, 1), (O,)
) -> InvertedResidualWeight:
    """Lays out the weights and biases of the three convolutions for `inverted_residual`. Raises ValueError for shapes that do not fit."""
    (taps, taps_bias), channels = depthwise, depthwise[0].shape[0]
    fits = taps.ndim == 4 and taps.shape[1:] == (1, *taps.shape[3:] * 2) and taps_bias.shape == (channels,)
    fits = fits and project[0].shape[1:] == (channels, 1, 1) and project[1].shape == project[0].shape[:1]
    if expand is not None:
        fits = fits and expand[0].ndim == 4 and expand[0].shape[::2] == (channels, 1) and expand[1].shape == (channels,)
    if not fits or 0 in (*taps.shape, *project[0].shape) or taps.shape[3] > MOST_ROWS:
        shapes = [None if pair is None else [tuple(t.shape) for t in pair] for pair in (expand, depthwise, project)]
        raise ValueError(f"weights must be (C, I, 1, 1), (C, 1, k, k) and (O, C, 1, 1) with their biases, k at most {MOST_ROWS}, got {shapes}")
    padding = -channels % CHUNK
    return InvertedResidualWeight(
        None if expand is None else _chunks(expand[0].flatten(1)),
        None if expand is None else F.pad(expand[1].float(), (0, padding)),
        F.pad(taps[:, 0].float().permute(1, 2, 0), (0, padding)).contiguous(),
        F.pad(taps_bias.float(), (0, padding)),
        _chunks(F.pad(project[0].flatten(1), (0, padding))),
        F.pad(project[1].float(), (0, -len(project[1]) % CHUNK)),
        len(project[1]),
    )


def _chunks(weight: Tensor) -> Tensor:
    """(O, I) -> (ceil(O / 16), I, 16)"""
    return F.pad(weight.float(), (0, 0, 0, -len(weight) % CHUNK)).unflatten(0, (-1, CHUNK)).transpose(1, 2).contiguous()


def inverted_residual(
    x: Tensor,  # (N, I, H, W) float32
    weight: InvertedResidualWeight,
    *,
    stride: int = 1,
    residual: bool = False,
    backend: str = "auto",
) -> Tensor:  # (N, O, ceil(H / stride), ceil(W / stride)), channels last
    """project(relu6(depthwise(relu6(expand(x))))), plus x if `residual`; biases included.

    The depthwise convolution pads with zeros as TensorFlow does: (k - stride) // 2 cells before the first and what the last output
    needs behind the last. float32: in bfloat16 the three convolutions of oneDNN, one after the other, are faster. Nothing is copied when
    channels are adjacent (channels last). The result does not depend on the number of threads. Where a gradient is needed the reference runs.

    Raises ValueError for shapes and devices, TypeError for dtypes, naming the argument.
    """
    if not isinstance(weight, InvertedResidualWeight):
        raise TypeError(f"weight must come from inverted_residual_weight, got {type(weight).__name__}")
    choice = _plan(x, *weight, stride, residual, backend)
    if choice == "empty":
        return x.new_empty(x.shape[0], weight.outputs, -(-x.shape[2] // stride), -(-x.shape[3] // stride))
    if choice == "reference":
        return reference(x, *weight, stride, residual)
    return _dispatch.call(choice, "inverted_residual", x, *weight, stride, residual)


def reference(
    x: Tensor, expand: Tensor | None, expand_bias: Tensor | None, taps: Tensor, taps_bias: Tensor, project: Tensor, project_bias: Tensor,
    outputs: int, stride: int, residual: bool,
) -> Tensor:  # fmt: skip
    """The definition in PyTorch."""
    kernel, channels = taps.shape[1:]
    if expand is None:
        y = F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))
    else:
        y = F.relu6(F.conv2d(x, _matrix(expand), expand_bias))
    before = (kernel - stride) // 2
    after = [max(-(-size // stride) * stride - stride + kernel - before - size, 0) for size in x.shape[2:]]
    y = F.pad(y, (before, after[1], before, after[0]))
    y = F.relu6(F.conv2d(y, taps.permute(2, 0, 1)[:, None], taps_bias, stride, groups=channels))
    y = F.conv2d(y, _matrix(project), project_bias)[:, :outputs]
    y = y + x if residual else y
    return y.contiguous(memory_format=torch.channels_last)


def _matrix(chunks: Tensor) -> Tensor:
    return chunks.transpose(1, 2).flatten(0, 1)[:, :, None, None]


@_dispatch.planned
def _plan(
    x: Tensor, expand: Tensor | None, expand_bias: Tensor | None, taps: Tensor, taps_bias: Tensor, project: Tensor, project_bias: Tensor,
    outputs: int, stride: int, residual: bool, backend: str,
) -> str:  # fmt: skip
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32, got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"x must have 4 dimensions, got shape {tuple(x.shape)}")
    weights = [t for t in (expand, expand_bias, taps, taps_bias, project, project_bias) if t is not None]
    for t in weights:
        if t.dtype != torch.float32 or t.device != x.device:
            raise (ValueError if t.dtype == torch.float32 else TypeError)(f"weight must be float32 on {x.device}, got {t.dtype} on {t.device}")
    inputs = x.shape[1]
    if inputs != expand.shape[1] if expand is not None else inputs + -inputs % CHUNK != taps.shape[2]:
        raise ValueError(f"x must have the weight's input channels, got shape {tuple(x.shape)}")
    if not isinstance(stride, int) or not 1 <= stride <= taps.shape[0]:
        raise ValueError(f"stride must be 1 to the kernel's {taps.shape[0]}, got {stride}")
    if residual and (stride > 1 or outputs != inputs):
        raise ValueError(f"residual needs stride 1 and as many outputs as inputs, got stride {stride}, {outputs} and {inputs}")
    if x.numel() == 0:
        return "empty"
    choice = _dispatch.choose("inverted_residual", backend, x, dtypes=(torch.float32,), slower="3 times")
    return "reference" if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)) else choice


@_dispatch.register_fake("inverted_residual")
def _fake(
    x: Tensor, expand: Tensor | None, expand_bias: Tensor | None, taps: Tensor, taps_bias: Tensor, project: Tensor, project_bias: Tensor,
    outputs: int, stride: int, residual: bool,
) -> Tensor:  # fmt: skip
    shape = (x.shape[0], outputs, *(-(-size // stride) for size in x.shape[2:]))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
