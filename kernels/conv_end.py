# SPDX-License-Identifier: Apache-2.0
"""What follows a convolution, in one pass where PyTorch takes one for each: bias, addition, ReLU. Called by pyvseg/layers/conv.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _finish(maps, bias, residual, P, C, RELU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at = p[:, None] * C + c[None, :]
    there = (p[:, None] < P) & (c[None, :] < C)
    x = tl.load(maps + at, mask=there, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        x += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    if RELU:
        x = tl.where(x < 0, 0.0, x)  # NaN stays
    tl.store(maps + at, x.to(maps.dtype.element_ty), mask=there)


def conv_end(maps: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """maps (B, C, H, W) + bias (C,) + residual, then ReLU where `relu`; in place. Maps and residual are channels last."""
    (B, C, H, W), channels = maps.shape, min(256, triton.next_power_of_2(maps.shape[1]))
    pixels = 2048 // channels
    if maps.numel():
        with torch.cuda.device_of(maps):
            _finish[(triton.cdiv(B * H * W, pixels), triton.cdiv(C, channels))](
                maps, bias, residual, B * H * W, C, RELU=relu, PIXELS=pixels, CHANNELS=channels, num_warps=4
            )
    return maps
