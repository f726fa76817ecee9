# SPDX-License-Identifier: Apache-2.0
"""3x3 convolution, stride 1, padding 1, with a quarter of the multiplications: Winograd's F(4x4, 3x3).

A 6x6 patch d of the input and a kernel g give the 4x4 tile of outputs A^T [(G g G^T) * (B^T d B)] A (Lavin and Gray,
Fast Algorithms for Convolutional Neural Networks, 2015). The matrices interpolate on the points 0, +-3/4, +-3/2 and
infinity; `conv3x3` tells how accurate that is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg.ops import _dispatch

__all__ = ["Conv3x3Weight", "conv3x3", "conv3x3_weight"]

B_T = (
    (81 / 64, 0, -45 / 16, 0, 1, 0),
    (0, -27 / 16, -9 / 4, 3 / 4, 1, 0),
    (0, 27 / 16, -9 / 4, -3 / 4, 1, 0),
    (0, -27 / 32, -9 / 16, 3 / 2, 1, 0),
    (0, 27 / 32, -9 / 16, -3 / 2, 1, 0),
    (0, 81 / 64, 0, -45 / 16, 0, 1),
)
G = (
    (64 / 81, 0, 0),
    (-128 / 243, -32 / 81, -8 / 27),
    (-128 / 243, 32 / 81, -8 / 27),
    (32 / 243, 16 / 81, 8 / 27),
    (32 / 243, -16 / 81, 8 / 27),
    (0, 0, 1),
)
A_T = (
    (1, 1, 1, 1, 1, 0),
    (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2, 0),
    (0, 9 / 16, 9 / 16, 9 / 4, 9 / 4, 0),
    (0, 27 / 64, -27 / 64, 27 / 8, -27 / 8, 1),
)
PANEL = 32  # output channels that the kernel multiplies at a time


class Conv3x3Weight(NamedTuple):
    """The weight of a 3x3 convolution, transformed by `conv3x3_weight`."""

    tiles: Tensor  # (ceil(O / 32), 36, I, 32) float32, zeros behind the last output
    outputs: int  # O


def conv3x3_weight(
    weight: Tensor,  # (O, I, 3, 3) floating point
) -> Conv3x3Weight:
    """Transforms the weight of a 3x3 convolution for `conv3x3`, in float64 and rounded once. It takes four times the memory.

    Raises TypeError for a dtype that is not floating point, ValueError for another shape.
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or 0 in weight.shape:
        raise ValueError(f"weight must be (O, I, 3, 3) with at least one channel, got shape {tuple(weight.shape)}")
    g = torch.tensor(G, dtype=torch.float64, device=weight.device)
    tiles = torch.einsum("ka,oiab,lb->oikl", g, weight.double(), g).to(torch.float32)
    outputs, inputs = weight.shape[:2]
    tiles = F.pad(tiles.reshape(outputs, inputs, 36), (0, 0, 0, 0, 0, -outputs % PANEL))
    return Conv3x3Weight(tiles.reshape(-1, PANEL, inputs, 36).permute(0, 3, 2, 1).contiguous(), outputs)


def conv3x3(
    x: Tensor,  # (N, I, H, W) float32 or bfloat16
    weight: Conv3x3Weight,  # of (O, I, 3, 3)
    bias: Tensor | None = None,  # (O,) float32
    *,
    relu_input: bool = False,
    residual: Tensor | None = None,  # (N, O, H, W), dtype of x
    backend: str = "auto",
) -> Tensor:  # (N, O, H, W), channels last
    """conv2d(x, weight, bias, stride 1, padding 1), of relu(x) if `relu_input`, plus `residual`.

    All between input and output is float32, also for bfloat16. Any strides; nothing is copied when channels are adjacent (channels last, or a slice of it). In float32 the root mean
    square error against float64 is 1 to 2 times that of `torch.conv2d` in channels last and 3.5 to 4.5 times that of its
    most accurate form, half of what the usual points 0, +-1, +-2 give. A NaN or infinity spreads over the 4x4 tiles that
    see it. The result does not depend on the number of threads. Where a gradient is needed the PyTorch reference runs.

    Raises ValueError for shapes and devices, TypeError for dtypes, naming the argument.
    """
    if not isinstance(weight, Conv3x3Weight):
        raise TypeError(f"weight must come from conv3x3_weight, got {type(weight).__name__}")
    choice = _plan(x, *weight, bias, residual, backend)
    if choice == "empty":
        return x.new_empty(x.shape[0], weight.outputs, *x.shape[2:])
    if choice == "reference":
        return reference(x, *weight, bias, residual, relu_input)
    return _dispatch.call(choice, "conv3x3", x, *weight, bias, residual, relu_input)


def reference(x: Tensor, tiles: Tensor, outputs: int, bias: Tensor | None, residual: Tensor | None, relu_input: bool) -> Tensor:
    """The definition in PyTorch."""
    dtype = x.dtype
    x, residual = (t.to(tiles.dtype) if t is not None else None for t in (x, residual))
    b_t, a_t = (torch.tensor(m, dtype=x.dtype, device=x.device) for m in (B_T, A_T))
    u = tiles.permute(1, 2, 0, 3).flatten(2)[..., :outputs]  # (36, I, O)
    height, width = x.shape[2:]
    x = F.pad(x.relu() if relu_input else x, (1, 1 + -width % 4, 1, 1 + -height % 4))
    patches = x.unfold(2, 6, 4).unfold(3, 6, 4)  # (N, I, h, w, 6, 6): a tile of 4x4 outputs and the ring around it
    images = []
    for d in patches:  # one at a time: the transformed patches take 36 / 16 of an image
        v = torch.einsum("ka,ihwab,lb->klhwi", b_t, d, b_t).reshape(36, -1, d.shape[0])
        m = (v @ u).unflatten(0, (6, 6)).unflatten(2, d.shape[1:3])
        tile = torch.einsum("yk,klhwo,xl->ohywx", a_t, m, a_t)
        images.append(tile.flatten(3).flatten(1, 2)[:, :height, :width])
    y = torch.stack(images)
    y = y if bias is None else y + bias[:, None, None]
    y = y if residual is None else y + residual
    return y.to(dtype).contiguous(memory_format=torch.channels_last)


@_dispatch.planned
def _plan(x: Tensor, tiles: Tensor, outputs: int, bias: Tensor | None, residual: Tensor | None, backend: str) -> str:
    for name, tensor, dims in (("x", x, 4), ("weight", tiles, 4), ("bias", bias, 1), ("residual", residual, 4)):
        if tensor is None and name in ("bias", "residual"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        dtypes = (torch.float32,) if name in ("weight", "bias") else (x.dtype,) if name == "residual" else (torch.float32, torch.bfloat16)
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, got {tensor.dtype}")
        if tensor.ndim != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x on {x.device}")
    inputs = tiles.shape[2]
    if x.shape[1] != inputs:
        raise ValueError(f"x must have the weight's {inputs} input channels, got shape {tuple(x.shape)}")
    if bias is not None and bias.shape[0] != outputs:
        raise ValueError(f"bias must have the weight's {outputs} output channels, got shape {tuple(bias.shape)}")
    expected = (x.shape[0], outputs, *x.shape[2:])
    if residual is not None and residual.shape != expected:
        raise ValueError(f"residual must have the result's shape {expected}, got {tuple(residual.shape)}")
    if x.numel() == 0:
        return "empty"
    tensors = [t for t in (x, tiles, bias, residual) if t is not None]
    choice = _dispatch.choose("conv3x3", backend, *tensors, dtypes=(torch.float32, torch.bfloat16), slower="10 times")
    return "reference" if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) else choice


@_dispatch.register_fake("conv3x3")
def _fake(x: Tensor, tiles: Tensor, outputs: int, bias: Tensor | None, residual: Tensor | None, relu_input: bool) -> Tensor:
    shape = (x.shape[0], outputs, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
