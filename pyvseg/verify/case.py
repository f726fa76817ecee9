# SPDX-License-Identifier: Apache-2.0
"""Reading a case folder: `manifest.json` (what was run, sizes, tolerances) and `tensors.npz` (inputs and results)."""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyvseg.errors import PyvsegError


class Entries(dict):
    """A dictionary out of a case: asking for what it lacks is the case's fault."""

    def __missing__(self, key):
        raise PyvsegError(f"damaged case: it has no entry {key!r}; fetch the case folder again")


@dataclass(frozen=True)
class Case:
    """One stored run.

    manifest: "system", "about", "config", "tolerance", "notes" and what else the case needs.
    weights: the published implementation's state dict, by its own names.
    inputs: the tensors under "in/"; names keep that beginning.
    expected: the tensors under "out/" and "tap/" (results between two stages), thinned where the manifest says so.
    """

    name: str
    manifest: dict
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]


def load_case(folder: str | Path) -> Case:
    """Read the case in `folder`. Raises PyvsegError where it is no case, or a damaged one."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(), object_hook=Entries)
        with np.load(folder / "tensors.npz", allow_pickle=False) as archive:
            tensors = Entries(archive)
    except OSError as error:
        raise PyvsegError(f"{folder}: not a case folder ({Path(error.filename or folder).name}: {error.strerror or error})") from None
    except (ValueError, EOFError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise PyvsegError(f"{folder}: damaged case ({str(error).splitlines()[0]}); fetch the case folder again") from None
    if not isinstance(manifest, dict):
        raise PyvsegError(f"{folder}: damaged case (manifest.json holds no object); fetch the case folder again")
    return Case(
        name=folder.resolve().name,
        manifest=manifest,
        weights=_weights(folder, manifest, tensors),
        inputs=Entries((key, value) for key, value in tensors.items() if key.startswith("in/")),
        expected={key: value for key, value in tensors.items() if key.startswith(("out/", "tap/"))},
    )


def _weights(folder: Path, manifest: dict, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A row of the manifest is [shape, mean, standard deviation], or "stored" where the tensor stands in the archive."""
    try:
        return {key: tensors[f"weight/{key}"] if row == "stored" else _weight(key, *row) for key, row in manifest["weights"].items()}
    except (TypeError, ValueError, AttributeError, MemoryError):
        raise PyvsegError(f"{folder}: damaged case (an entry of \"weights\" is malformed); fetch the case folder again") from None


def _weight(key: str, shape: list[int], mean: float, std: float) -> np.ndarray:
    """Pseudo-random float32 weights that depend on nothing but the arguments: numpy's legacy generator never changes its stream."""
    normal = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape))
    return (mean + std * normal).astype(np.float32)
