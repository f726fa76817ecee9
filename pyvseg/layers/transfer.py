# SPDX-License-Identifier: Apache-2.0
"""Between main memory and a GPU without making the host wait: while the GPU works on one clip, the host prepares the next."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def to_device(images: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device. To a GPU by pinned memory, whose blocks PyTorch uses again as soon as they are free, on a stream
    that does nothing else."""
    x = torch.from_numpy(images)
    if device.type != "cuda":
        return x.to(device)
    work, copies = torch.cuda.current_stream(device), _copies(device)
    with torch.cuda.stream(copies):
        there = x.pin_memory().to(device, non_blocking=True)
    work.wait_stream(copies)
    there.record_stream(work)
    return there


@lru_cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@lru_cache(256)
@torch.inference_mode(False)  # training may need it in its backward
def constant(values: tuple, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of these numbers, made once for each device: the host would wait whenever it makes one there. Not to be changed."""
    return torch.tensor(values, dtype=dtype).to(device)


class Arriving:
    """A tensor of a GPU on its way to main memory."""

    def __init__(self, x: Tensor) -> None:
        self._there = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._there.copy_(x, non_blocking=True)
        self._done = torch.cuda.Event(blocking=True)
        self._done.record()

    def wait(self) -> np.ndarray:
        self._done.synchronize()
        return self._there.numpy()


def from_device(x: Tensor) -> np.ndarray | Arriving:
    """The tensor in main memory; from a GPU as something that is to be waited for."""
    return Arriving(x) if x.device.type == "cuda" else x.numpy()


def arrived(x: np.ndarray | Arriving) -> np.ndarray:
    return x.wait() if isinstance(x, Arriving) else x
