# SPDX-License-Identifier: Apache-2.0
"""What a video's result needs of every frame, kept outside memory: arrays in order, and the masks of objects."""

from __future__ import annotations

import math
import shutil
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir

import numpy as np
import torch
from torch import Tensor

from pyvseg.errors import OutputError
from pyvseg.layers.transfer import Arriving, arrived, from_device, has_arrived

MEMORY_BYTES = 8 << 20  # of a spool that stay in memory; more goes to a temporary file
_MARGIN = 2  # cells around a mask's set cells that its full-size pixels depend on, see `MaskStore`
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8)
_BEHIND = 12  # tensors of a GPU that may be on their way
_HEAD = 6  # numbers before a tensor's values: dtype, dimensions, at most four of them


class Spool:
    """Tensors kept in order, in a temporary file when they are many; 8 bytes of each stay in memory. Picklable.

    In the file a tensor's shape and dtype stand before its values. Raises OutputError where the temporary folder is full.
    """

    def __init__(self) -> None:
        self._file = SpooledTemporaryFile(MEMORY_BYTES)
        self._starts = array("q")
        self._end = 0
        self._coming: deque[tuple[Tensor | Arriving, Callable[[Tensor], Iterable[Tensor]]]] = deque()

    def __len__(self) -> int:
        self._settle()
        return len(self._starts)

    @property
    def nbytes(self) -> int:
        self._settle()
        return self._end

    def append(self, tensor: Tensor) -> int:
        """Keeps a tensor of at most 4 dimensions; returns its number."""
        self._settle()
        return self._write(arrived(from_device(tensor.detach())))

    def later(self, tensor: Tensor, make: Callable[[Tensor], Iterable[Tensor]] = lambda x: (x,)) -> None:
        """Appends what `make` makes of the tensor: from a GPU when that has arrived, so that nobody waits for it here."""
        self._coming.append((from_device(tensor.detach()), make))
        while self._coming and (len(self._coming) > _BEHIND or has_arrived(self._coming[0][0])):
            self._take_over()

    def _settle(self) -> None:
        while self._coming:
            self._take_over()

    def _take_over(self) -> None:
        tensor, make = self._coming.popleft()
        for each in make(arrived(tensor)):
            self._write(each)

    def _write(self, tensor: Tensor) -> int:
        data = tensor.contiguous()
        head = np.zeros(_HEAD, np.int64)
        head[: 2 + data.ndim] = (_DTYPES.index(data.dtype), data.ndim, *data.shape)
        with _disk_errors():
            self._file.seek(self._end)
            self._file.write(head.data)
            self._file.write(data.flatten().view(torch.uint8).numpy().data)
        self._starts.append(self._end)
        self._end += head.nbytes + data.nbytes
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> Tensor:
        dtype, shape = self._head(number)
        return self._values(dtype, math.prod(shape)).view(shape)

    def part(self, number: int, start: int, count: int) -> Tensor:
        """`count` values of tensor `number` in its flat order, from `start` on."""
        dtype, _ = self._head(number)
        self._file.seek(start * dtype.itemsize, 1)
        return self._values(dtype, count)

    def _head(self, number: int) -> tuple[torch.dtype, tuple[int, ...]]:
        self._settle()
        self._file.seek(self._starts[number])
        dtype, dimensions, *shape = np.frombuffer(self._file.read(8 * _HEAD), np.int64).tolist()
        return _DTYPES[dtype], tuple(shape[:dimensions])

    def _values(self, dtype: torch.dtype, count: int) -> Tensor:
        return torch.frombuffer(bytearray(self._file.read(count * dtype.itemsize)), dtype=dtype) if count else torch.empty(0, dtype=dtype)

    def save(self, path: Path) -> None:
        """Writes everything to `path`; `load` reads it."""
        self._settle()
        with _disk_errors(path), open(path, "wb") as out:
            np.array([len(self), self._end], np.int64).tofile(out)
            self._starts.tofile(out)
            self._file.seek(0)
            shutil.copyfileobj(self._file, out, 1 << 20)

    @classmethod
    def load(cls, path: Path) -> Spool:
        """Raises ValueError or OSError for a file that is not whole."""
        spool = cls()
        with open(path, "rb") as file:
            count, spool._end = np.frombuffer(file.read(16), np.int64).tolist()
            if 16 + 8 * count + spool._end != path.stat().st_size:
                raise ValueError(f"{path} is cut short")
            spool._starts.fromfile(file, count)
            with _disk_errors():
                shutil.copyfileobj(file, spool._file, 1 << 20)
        return spool

    def __getstate__(self) -> dict:
        self._settle()
        self._file.seek(0)
        return {"bytes": self._file.read(), "starts": self._starts}

    def __setstate__(self, state: dict) -> None:
        self.__init__()
        self._file.write(state["bytes"])
        self._starts, self._end = state["starts"], len(state["bytes"])


@contextmanager
def _disk_errors(path: Path | None = None):
    try:
        yield
    except OSError as error:
        if path is not None:
            raise OutputError(f"cannot write {path}: {error.strerror or error}; free space or choose another --out") from None
        raise OutputError(f"temporary folder {gettempdir()}: {error.strerror or error}; free space there or let TMPDIR name another") from None


@dataclass
class MaskStore:
    """Stride-4 mask logits of a video's objects, only where they can matter: a mask that is nowhere set takes no room.

    A full-size pixel is interpolated from cells at most `_MARGIN` apart, and is set only if one of them is; so the box of
    the set cells with that margin gives the very same masks. Of every frame the spool holds the boxes
    (N, 5) of object, top, left, height and width, and then the logits in them.
    """

    grid: tuple[int, int] = (0, 0)
    spool: Spool = field(default_factory=Spool)

    def __len__(self) -> int:
        return len(self.spool) // 2

    def append(self, logits: Tensor, objects: list[int]) -> None:
        """The next frame: logits (N, h, w) of `objects`."""
        self.grid = tuple(logits.shape[-2:])
        self.spool.later(logits, partial(_boxed, objects))

    def get(self, frame: int, objects: list[int]) -> tuple[list[int], Tensor]:
        """Which of `objects` (their positions) have a mask in `frame`, and the logits (P, h, w) of these."""
        boxes = self.spool[2 * frame].numpy()
        starts = np.cumsum(boxes[:, 3] * boxes[:, 4]) - boxes[:, 3] * boxes[:, 4]
        row = {int(name): i for i, name in enumerate(boxes[:, 0])}
        present = [i for i, name in enumerate(objects) if name in row]
        logits = torch.full((len(present), *self.grid), -1.0)
        for plane, i in zip(logits, present):
            _, top, left, height, width = boxes[row[objects[i]]].tolist()
            part = self.spool.part(2 * frame + 1, int(starts[row[objects[i]]]), height * width)
            plane[top : top + height, left : left + width] = part.view(height, width)
        return present, logits


def _boxed(objects: list[int], logits: Tensor) -> tuple[Tensor, Tensor]:
    """What a `MaskStore` keeps of a frame: boxes and the logits in them."""
    inside = (logits > 0).view(torch.uint8)  # `any` of bool takes PyTorch five times as long
    rows, columns = (inside.amax(dim).bool().numpy() for dim in (2, 1))
    present = np.flatnonzero(rows.any(1))
    (top, bottom), (left, right) = _spans(rows[present]), _spans(columns[present])
    boxes = np.stack([np.asarray(objects, np.int32)[present], top, left, bottom - top, right - left], 1).astype(np.int32)
    parts = [logits[i, t:b, le:r].float().flatten() for i, t, b, le, r in zip(present.tolist(), top, bottom, left, right)]
    return torch.from_numpy(boxes), (torch.cat(parts) if parts else torch.empty(0))


def _spans(set_lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the set entries of each row of bool (N, L) begin and end, with the margin."""
    length = set_lines.shape[1]
    first, last = set_lines.argmax(1), length - set_lines[:, ::-1].argmax(1)
    return np.maximum(first - _MARGIN, 0), np.minimum(last + _MARGIN, length)


class Segments:
    """COCO RLE of a video's objects in every frame, None where an object has no pixel; kept in a spool."""

    def __init__(self, size: tuple[int, int], objects: list[int], frames: int) -> None:
        self.size, self.frames = size, frames
        self._rows = {name: i for i, name in enumerate(objects)}
        self._numbers = np.full((len(objects), frames), -1, np.int64)
        self._spool = Spool()

    def put(self, name: int, frame: int, rle: dict) -> None:
        counts = bytearray(rle["counts"], "ascii")
        self._numbers[self._rows[name], frame] = self._spool.append(torch.frombuffer(counts, dtype=torch.uint8))

    def at(self, name: int, frame: int) -> dict | None:
        number = int(self._numbers[self._rows[name], frame])
        return None if number < 0 else {"size": list(self.size), "counts": bytes(self._spool[number].numpy()).decode("ascii")}

    def __getitem__(self, name: int) -> list[dict | None]:
        """The object in all frames."""
        return [self.at(name, t) for t in range(self.frames)]
