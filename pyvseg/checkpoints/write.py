# SPDX-License-Identifier: Apache-2.0
"""Writing a weights file so that it is either whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from pyvseg.errors import OutputError


def write(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `state` as a safetensors file with `metadata` in its header.

    The file appears under its name only when it is complete; until then an older file of that name stays as it was.
    Raises OutputError where the folder cannot be written or is full.
    """
    path = Path(path)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    data = safetensors.torch.save(_unshared(tensors), dict(metadata or {}))
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            partial = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)  # a temporary file is born private
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); nothing was changed") from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The format has no place for tensors that share memory: the second of two gets a copy."""
    seen: set[int] = set()
    result = {}
    for key, value in tensors.items():
        storage = value.untyped_storage().data_ptr()
        result[key] = value.clone() if storage in seen else value
        seen.add(storage)
    return result
