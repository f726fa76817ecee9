# SPDX-License-Identifier: Apache-2.0
"""Reading a weights file into a flat dictionary of tensors."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyvseg.checkpoints.numpy_pickle import load_numpy_pickle
from pyvseg.errors import CheckpointError

WRAPPERS = ("state_dict", "model", "network")  # published training files keep the weights under one of these
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # how torch.save's files began before torch 1.6
MAX_HEADER = 100 << 20  # bytes; the safetensors format's own limit


def read(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a `.safetensors` file, of a `.pth`/`.pt` file written by `torch.save`, or of a `.pkl` of numpy arrays as
    detectron2 publishes them, on the CPU, under the file's own names.

    The contents decide what it is, not the file's name. The usual wrappings (`state_dict`, `model`, `network`,
    a `module.` before every name) are taken off. Pickled files go through torch's restricted reader, which knows tensors and
    containers and calls nothing else; memory stays in proportion to the size of the file, whatever sizes it claims.

    Raises CheckpointError: no such file, not a checkpoint, truncated, holding other things than tensors, or unsafe.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(LEGACY_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); give the path of a .safetensors, .pth, .pt or .pkl file") from None
    if path.suffix == ".safetensors" or _is_safetensors(start, size):
        return _read_safetensors(path)
    return _flat(_read_torch(path, start, size), path, size)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text entries in the header of a `.safetensors` file; an empty dictionary for any other kind of file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def _is_safetensors(start: bytes, size: int) -> bool:
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= min(size, MAX_HEADER)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    # From bytes, not from a memory map: the tensors stay whole if the file is overwritten later.
    try:
        return safetensors.torch.load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, truncated or damaged ({_one_line(error)}); fetch or copy it again") from None


def _read_torch(path: Path, start: bytes, size: int) -> object:
    is_zip = start.startswith(b"PK")
    if start[:1] == b"\x80" and start != LEGACY_MAGIC:
        return _read_pickle(path)
    if is_zip:
        _check_members(path, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Not memory-mapped: only the copying reader compares each tensor's claimed size with what the file holds.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path}: {_explain(error, is_zip or start == LEGACY_MAGIC)}") from None


def _read_pickle(path: Path) -> object:
    """A bare pickle: detectron2's model zoo has numpy arrays in them."""
    try:
        loaded = load_numpy_pickle(path.read_bytes())
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path}: {_explain(error, True)}") from None
    while isinstance(loaded, dict) and isinstance(inner := loaded.get("model"), dict):
        loaded = inner
    if not isinstance(loaded, dict):
        return loaded
    return {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in loaded.items()}


def _check_members(path: Path, size: int) -> None:
    """Refuse archives that unpack to more than their own size; torch.save stores its members uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        raise CheckpointError(f"{path}: truncated or damaged archive; fetch or copy it again") from None
    claimed = sum(member.file_size for member in members)
    if claimed > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path}: archive of {size} bytes claims to unpack to {claimed}; not a file that torch.save wrote")


def _explain(error: Exception, looks_like_torch: bool) -> str:
    forbidden = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if forbidden:
        return (
            f"unsafe: it asks for the Python object {forbidden[1]}, and weights need none; nothing was executed. "
            "Save the bare tensors again (state dict, or safetensors) if you trust the file"
        )
    if looks_like_torch:
        return f"truncated or damaged checkpoint ({_one_line(error)}); fetch or copy it again"
    return "not a checkpoint; give a .safetensors file, a .pth/.pt file written by torch.save, or a .pkl of numpy arrays"


def _flat(loaded: object, path: Path, size: int) -> dict[str, Tensor]:
    while isinstance(loaded, dict) and (inner := next((loaded[k] for k in WRAPPERS if isinstance(loaded.get(k), dict)), None)) is not None:
        loaded = inner
    if not isinstance(loaded, dict) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path}: holds no dictionary of tensors; expected a state dict, bare or under {', '.join(WRAPPERS)}")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: entry {key!r} is a {type(value).__name__}, not a tensor; save the bare state dict")
        if value.layout != torch.strided or value.device.type != "cpu" or value.numel() * value.element_size() > size:
            raise CheckpointError(f"{path}: tensor {key!r} of shape {tuple(value.shape)} is not backed by the file's {size} bytes")
    if all(key.startswith("module.") for key in loaded):
        loaded = {key.removeprefix("module."): value for key, value in loaded.items()}
    return dict(loaded)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
