# SPDX-License-Identifier: Apache-2.0
"""The hot paths as public functions. One file per op: contract, PyTorch reference, autograd; kernels in csrc/ and kernels/."""

from pyvseg.ops._dispatch import backend, report
from pyvseg.ops.conv3x3 import Conv3x3Weight, conv3x3, conv3x3_weight
from pyvseg.ops.mask_iou import PackedMasks, mask_iou, mask_overlap, pack_masks
from pyvseg.ops.memory_read import memory_read

__all__ = [
    "Conv3x3Weight",
    "PackedMasks",
    "backend",
    "conv3x3",
    "conv3x3_weight",
    "mask_iou",
    "mask_overlap",
    "memory_read",
    "pack_masks",
    "report",
]
