# SPDX-License-Identifier: Apache-2.0
"""Sine position codes (Carion et al., DETR, ECCV 2020), for maps and for clips of maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyvseg.layers.transfer import made_once


@made_once(64)
def sine_code_2d(height: int, width: int, channels: int, device: torch.device, dtype: torch.dtype, centred: bool = False) -> Tensor:
    """(height * width, channels), row by row: the first half of the channels says the row, the second the column.

    centred   of the pixels' centres, as Deformable DETR has it
    """
    rows, columns = (_axis(size, channels // 2, device, 0.5 if centred else 0.0) for size in (height, width))
    code = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], -1)
    return code.reshape(height * width, channels).to(dtype)


@made_once(64)
def sine_code_3d(frames: int, height: int, width: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(frames * height * width, channels), frame by frame: the 2-D code plus a code of the frame number on all channels."""
    code = sine_code_2d(height, width, channels, device, torch.float32) + _axis(frames, channels, device)[:, None]
    return code.flatten(0, 1).to(dtype)


def _axis(size: int, channels: int, device: torch.device, shift: float = 0.0) -> Tensor:
    """(size, channels): sines and cosines of the positions 1..size, less `shift`, scaled to a full turn, wavelengths growing to 10000."""
    turns = (torch.arange(1, size + 1, dtype=torch.float32, device=device) - shift) / (size + 1e-6) * (2 * math.pi)
    channel = torch.arange(channels, device=device)
    wavelength = 10000 ** (2 * (channel // 2) / channels)
    angle = turns[:, None] / wavelength
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())
