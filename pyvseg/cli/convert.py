# SPDX-License-Identifier: Apache-2.0
"""`pyvseg convert`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from pyvseg import __version__
from pyvseg.errors import PyvsegError


@dataclass
class Convert:
    """Turn a published checkpoint (.pth, .pt, .pkl) into a safetensors file with pyvseg's own names.

    The result loads faster, holds the weights alone, and says in its header which model it is. For example

        pyvseg convert CTVIS_checkpoint.pth ctvis.safetensors --model ctvis_r50_ytvis19
    """

    source: tyro.conf.Positional[Path]
    """The published file."""
    target: tyro.conf.Positional[Path]
    """The file to write, *.safetensors."""
    model: str = tyro.MISSING
    """The model that the weights are for, a name of `pyvseg models`."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """How the weights are stored; bfloat16 is half the size and not exact."""
    overwrite: bool = False
    """Replace a file that is already there."""


def convert(options: Convert) -> None:
    import torch

    from pyvseg import checkpoints
    from pyvseg.models import zoo

    if options.target.suffix != ".safetensors":
        raise PyvsegError(f"{options.target}: the result is a safetensors file; give it a name that ends in .safetensors")
    if options.target.exists() and not options.overwrite:
        raise PyvsegError(f"{options.target} is already there; choose another name, or replace it with --overwrite")
    chosen = zoo.variant(options.model)
    weights = checkpoints.read(options.source)
    state = zoo.build_variant(chosen, weights, name=str(options.source)).state_dict()
    dtype = getattr(torch, options.precision)
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    metadata = {
        "format": "pyvseg", "model": chosen.name, "system": chosen.system, "source": options.source.name,
        "licence": chosen.licence, "precision": options.precision, "pyvseg": __version__,
    }  # fmt: skip
    checkpoints.write(options.target, state, metadata)
    size = options.target.stat().st_size / 1e6
    print(f"{options.target}   {len(state)} tensors, {size:.1f} MB, for --model {chosen.name}")
