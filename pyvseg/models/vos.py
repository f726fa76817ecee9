# SPDX-License-Identifier: Apache-2.0
"""Semi-supervised segmentation as the engine sees it: frames to network input and back, and the state between clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg import checkpoints
from pyvseg.errors import CheckpointError
from pyvseg.layers.transfer import Arriving, constant, on_gpu, to_device
from pyvseg.models.memory import MemoryBank

DEFAULT_MEMORY_FRAMES = 16
_CHUNK_BYTES = 256 << 20  # of full-size probabilities on a GPU


@dataclass(frozen=True)
class Geometry:
    """Where a video's pixels lie in the network's input: resized to (height, width), then padded by (left, right, top, bottom)."""

    source: tuple[int, int]
    resized: tuple[int, int]
    padding: tuple[int, int, int, int]

    @classmethod
    def of(cls, height: int, width: int, short_side: int | None, multiple: int = 16) -> Geometry:
        resized = (height, width)
        if short_side is not None and min(resized) != short_side:
            resized = tuple(short_side if s == min(resized) else int(short_side * s / min(resized)) for s in resized)
        across, down = -resized[1] % multiple, -resized[0] % multiple
        return cls((height, width), resized, (across // 2, across - across // 2, down // 2, down - down // 2))

    def frames(self, images: Sequence[np.ndarray] | np.ndarray, mean: tuple, std: tuple, device: torch.device) -> Tensor:
        """L images, uint8 RGB (H, W, 3) -> normalised network input (L, 3, h, w), float32, channels last.

        The published order: normalise, then resize by bicubic interpolation without antialiasing, then pad with zeros. On a CPU the
        first two change places, which only rounds differently, for OpenCV's resizing: 8 times as fast and closer to float64.
        """
        if not on_gpu(device):
            return self._frames_on_cpu(images, mean, std)
        x = to_device(images, device).permute(0, 3, 1, 2) / 255
        x = (x - constant(tuple(mean), device).view(3, 1, 1)) / constant(tuple(std), device).view(3, 1, 1)
        if self.resized != self.source:
            x = F.interpolate(x, self.resized, mode="bicubic", align_corners=False)
        return F.pad(x, self.padding).contiguous(memory_format=torch.channels_last)

    def _frames_on_cpu(self, images: Sequence[np.ndarray] | np.ndarray, mean: tuple, std: tuple) -> Tensor:
        left, right, top, bottom = self.padding
        (height, width), deviation = self.resized, torch.tensor(std)
        shift, scale = (-torch.tensor(mean) / deviation).repeat(width), (1 / (255 * deviation)).repeat(width)
        x = torch.zeros(len(images), top + height + bottom, left + width + right, 3)
        for frame, image in zip(x, images):
            image = image.astype(np.float32)
            if self.resized != self.source:
                image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
            inside = frame[top : top + height, left : left + width].view(height, -1)  # long rows: a loop over three channels is slow
            torch.addcmul(shift, torch.from_numpy(image).view(height, -1), scale, out=inside)
        return x.permute(0, 3, 1, 2)

    def masks(self, labels: np.ndarray, ids: list[int], device: torch.device) -> Tensor:
        """Label image uint8 (H, W) -> one float mask per id (K, h, w), resized by the nearest-pixel floor rule."""
        one_hot = torch.from_numpy(np.stack([labels == i for i in ids])).to(device, torch.float32)
        if self.resized != self.source:
            one_hot = F.interpolate(one_hot[None], self.resized, mode="nearest")[0]
        return F.pad(one_hot, self.padding)

    def labels(self, probabilities: Tensor, ids: list[int]) -> list[np.ndarray] | Arriving:
        """Probabilities (K + 1, L, h, w) of the background and of `ids` -> L label images, uint8 (H, W); ties go to the lower place."""
        left, _, top, _ = self.padding
        probabilities = probabilities[..., top : top + self.resized[0], left : left + self.resized[1]]
        if not on_gpu(probabilities.device):
            return [_most_probable([self._resized_back(plane) for plane in frame], ids) for frame in probabilities.transpose(0, 1).numpy()]
        together = max(1, _CHUNK_BYTES // (4 * len(probabilities) * self.source[0] * self.source[1]))
        values = constant((0, *ids), probabilities.device, torch.uint8)
        return Arriving(torch.cat([values[self._to_source(p).argmax(0)] for p in probabilities.split(together, 1)]))

    def _to_source(self, p: Tensor) -> Tensor:
        return p if self.resized == self.source else F.interpolate(p, self.source, mode="bilinear", align_corners=False)

    def _resized_back(self, plane: np.ndarray) -> np.ndarray:
        """`_to_source` by OpenCV, in a quarter of the time; it errs by 1e-7 where PyTorch errs by 4e-5."""
        return plane if self.resized == self.source else cv2.resize(plane, self.source[::-1], interpolation=cv2.INTER_LINEAR)


def _most_probable(planes: list[np.ndarray], ids: list[int]) -> np.ndarray:
    """What argmax over the planes says, plane by plane: PyTorch's own, across planes, takes a quarter of a whole frame's time."""
    best, labels = planes[0], np.zeros(planes[0].shape, np.uint8)
    for i, plane in zip(ids, planes[1:]):
        cv2.copyTo(np.full_like(labels, i), cv2.compare(plane, best, cv2.CMP_GT), labels)
        best = cv2.max(best, plane)
    return labels


@dataclass
class VOSState:
    """Everything that a video's later frames depend on; bounded if the bank is.

    object_ids          dataset ids in order of entry: the order of every probability volume behind the background
    banks               one memory bank per group of objects that entered together
    last_memory         index of the frame that entered memory last
    max_memory_frames   bound on the frames of each bank, None for none
    """

    max_memory_frames: int | None = DEFAULT_MEMORY_FRAMES
    object_ids: list[int] = field(default_factory=list)
    banks: list[MemoryBank] = field(default_factory=list)
    last_memory: int = -1

    def remember(self, index: int, key: Tensor, values: Tensor, *, annotated: bool) -> None:
        """Add frame `index` to every bank: key (cells, CK), values (K, cells, CV) in the order of `object_ids`."""
        for bank in self.banks:
            bank.append(index, key, self._rows(values, bank), annotated=annotated, max_frames=self.max_memory_frames)
        self.last_memory = index

    def remember_temporarily(self, key: Tensor, values: Tensor) -> None:
        """Add a frame that the next `remember` or `remember_temporarily` drops."""
        for bank in self.banks:
            bank.temporary = 0
            bank.append_temporary(key, self._rows(values, bank))

    def _rows(self, values: Tensor, bank: MemoryBank) -> Tensor:
        rows = tuple(self.object_ids.index(i) for i in bank.object_ids)
        return values if rows == tuple(range(len(values))) else values[constant(rows, values.device, torch.int64)]

    def save(self, path: str | Path) -> None:
        """Write the state as safetensors; `load` gives back one that continues bit for bit the same."""
        tensors = {}
        for n, bank in enumerate(self.banks):
            rows = (bank.frames + bank.temporary) * bank.cells
            tensors[f"bank{n}.keys"] = bank.keys[:, :rows].contiguous()
            tensors[f"bank{n}.values"] = bank.values[:, :, :rows].contiguous()
            counts = [bank.cells, bank.frames, bank.temporary]
            tensors[f"bank{n}.counts"] = torch.tensor(counts)
            tensors[f"bank{n}.object_ids"] = torch.tensor(bank.object_ids)
            tensors[f"bank{n}.origin"] = torch.tensor(bank.origin)
        tensors["object_ids"] = torch.tensor(self.object_ids, dtype=torch.int64)
        tensors["last_memory"] = torch.tensor([self.last_memory])
        bound = -1 if self.max_memory_frames is None else self.max_memory_frames
        tensors["max_memory_frames"] = torch.tensor([bound])
        checkpoints.write(path, tensors, {"format": "pyvseg-vos-state"})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> VOSState:
        """Raises CheckpointError for a file that `save` did not write."""
        tensors = {k: v.to(device) for k, v in checkpoints.read(path).items()}
        if "max_memory_frames" not in tensors:
            raise CheckpointError(f"{path}: not a saved state of a video; start the video again")
        bound = int(tensors["max_memory_frames"])
        state = cls(None if bound < 0 else bound, tensors["object_ids"].tolist(), [], int(tensors["last_memory"]))
        while f"bank{len(state.banks)}.keys" in tensors:
            get = lambda name: tensors[f"bank{len(state.banks)}.{name}"]  # noqa: E731
            cells, frames, temporary = get("counts").tolist()
            ids = tuple(get("object_ids").tolist())
            state.banks.append(
                MemoryBank(ids, cells, get("keys"), get("values"), frames, temporary, get("origin").tolist())
            )
        return state
