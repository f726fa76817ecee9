# SPDX-License-Identifier: Apache-2.0
"""Between main memory and a GPU without making the host wait: while the GPU works on one clip, the host prepares the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import lru_cache, wraps

import numpy as np
import torch
from torch import Tensor


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def to_device(images: Sequence[np.ndarray] | np.ndarray, device: torch.device) -> Tensor:
    """The images, uint8 (H, W, 3), all of a size, as a tensor (L, H, W, 3) on the device. To a GPU by pinned memory, whose blocks PyTorch
    uses again as soon as they are free, on a stream that does nothing else."""
    if not on_gpu(device):
        return torch.from_numpy(np.ascontiguousarray(images)).to(device)
    pinned = torch.empty(len(images), *images[0].shape, dtype=torch.uint8, pin_memory=True)
    np.stack(images, out=pinned.numpy())
    work, copies = torch.cuda.current_stream(device), _stream(device, "up")
    with torch.cuda.stream(copies):
        there = pinned.to(device, non_blocking=True)
    work.wait_stream(copies)
    there.record_stream(work)
    return there


@lru_cache
def _stream(device: torch.device, use: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """On a GPU the block's work goes to a stream for threads beside the model's, behind all that is under way when it begins."""
    if not on_gpu(device):
        yield
        return
    stream = _stream(device, "aside")
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


_held: list[Tensor] | None = None  # while a graph is captured: what it may read


@contextmanager
def holding() -> Iterator[list[Tensor]]:
    """The tensors `made_once` that are asked for within the block. A CUDA graph reads them where they lie, so it has to hold them."""
    global _held
    before, _held = _held, []
    try:
        yield _held
    finally:
        _held = before


def made_once(most: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorates a function that makes a tensor of numbers, sizes and a device: the last `most` are kept. Not to be changed."""

    def decorate(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kept = lru_cache(most)(torch.inference_mode(False)(make))  # training may need it in its backward

        @wraps(make)
        def given(*args) -> Tensor:
            x = kept(*args)
            if _held is not None:
                _held.append(x)
            return x

        return given

    return decorate


@made_once(256)
def constant(values: tuple, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of these numbers: the host would wait whenever it makes one on a GPU."""
    return torch.tensor(values, dtype=dtype).to(device)


class Arriving:
    """A tensor of a GPU on its way to main memory."""

    def __init__(self, x: Tensor) -> None:
        work, copies = torch.cuda.current_stream(x.device), _stream(x.device, "down")
        copies.wait_stream(work)
        self._there = torch.empty_like(x, device="cpu", pin_memory=True)
        self._done = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(copies):
            self._there.copy_(x, non_blocking=True)
            self._done.record(copies)
        x.record_stream(copies)

    def __iter__(self) -> Iterator[Arriving]:
        """Along the first dimension."""
        for row in self._there:
            part = copy(self)
            part._there = row
            yield part

    def is_there(self) -> bool:
        return self._done.query()

    def wait(self) -> Tensor:
        self._done.synchronize()
        return self._there


def from_device(x: Tensor) -> Tensor | Arriving:
    """The tensor in main memory; from a GPU as something that is to be waited for."""
    return Arriving(x) if on_gpu(x.device) else x


def has_arrived(x: Tensor | Arriving) -> bool:
    return not isinstance(x, Arriving) or x.is_there()


def arrived(x: Tensor | Arriving) -> Tensor:
    return x.wait() if isinstance(x, Arriving) else x
