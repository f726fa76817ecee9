# SPDX-License-Identifier: Apache-2.0
"""Maps of depth as PNG, as Cityscapes-DVPS and SemKITTI-DVPS have them: 16 bits, 256 to a metre, 0 where none was measured."""

from pathlib import Path

import numpy as np

from pyvseg.video.png import read_numbers, write_numbers

PER_METRE = 256


def read_depth(path: str | Path) -> np.ndarray:
    """Metres, float32 (H, W). Raises VideoError."""
    return read_numbers(path).astype(np.float32) / PER_METRE


def write_depth(path: str | Path, metres: np.ndarray) -> None:
    """Writes float (H, W), rounded and up to just below 256 metres: whole or not at all. Raises ValueError for depth that is no number, OSError."""
    if not np.isfinite(metres).all():
        raise ValueError("depth must be finite, in metres")
    write_numbers(path, np.rint(metres * PER_METRE).clip(0, np.iinfo(np.uint16).max).astype(np.uint16))
