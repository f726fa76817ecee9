# SPDX-License-Identifier: Apache-2.0
"""The colour of every object id, the same in PNGs and overlays."""

import numpy as np


def davis_palette() -> np.ndarray:
    """The DAVIS / PASCAL VOC colour map: uint8 (256, 3), RGB; row = object id, row 0 (background) is black."""
    ids = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):  # three bits of the id at a time, from the lowest, fill R, G, B from the highest bit down
        for channel in range(3):
            palette[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


PALETTE = davis_palette()
