# SPDX-License-Identifier: Apache-2.0
"""Putting a file's tensors into a model, all or nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pyvseg.checkpoints.systems import guess_system
from pyvseg.errors import CheckpointError

KeyMap = Sequence[tuple[str, str]]  # (regular expression, replacement), applied in order to every name


def map_keys(state: Mapping[str, Tensor], key_map: KeyMap, *, name: str = "checkpoint") -> dict[str, Tensor]:
    """`state` under new names: each rule of `key_map` is applied in order, as `re.sub`, to every name.

    Raises CheckpointError where two names become one.
    """
    mapped: dict[str, Tensor] = {}
    for key, value in state.items():
        new = key
        for pattern, replacement in key_map:
            new = re.sub(pattern, replacement, new)
        if new in mapped:
            raise CheckpointError(f"{name}: two tensors of the file would both become {new}; the second is {key}")
        mapped[new] = value
    return mapped


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    key_map: KeyMap = (),
    *,
    name: str,
    ignore: str | None = None,
) -> None:
    """Copy `state`, names mapped by `key_map`, into `model`; dtypes follow the model.

    A rule about values rather than names (an old file with fewer input channels, say) is applied to `state` before this call.

    Args:
        name: what the messages call the model or its file.
        ignore: a regular expression for names, after mapping, that are not looked at on either side (counters, recomputed tables).

    Raises CheckpointError, and leaves the model as it was, unless every name and shape fits: the message lists what is
    missing, unexpected or of another shape, and whose file it seems to be.
    """
    ours = model.state_dict()
    theirs = map_keys(state, key_map, name=name)
    if ignore is not None:
        ours, theirs = ({k: v for k, v in d.items() if not re.search(ignore, k)} for d in (ours, theirs))
    shapes = [
        f"{key}: file {tuple(theirs[key].shape)}, model {tuple(value.shape)}"
        for key, value in ours.items()
        if key in theirs and theirs[key].shape != value.shape
    ]
    problems = [
        _listed("missing", [key for key in ours if key not in theirs]),
        _listed("unexpected", [key for key in theirs if key not in ours]),
        _listed("of another shape", shapes),
    ]
    if any(problems):
        system = guess_system(state)
        origin = f" (the file looks like {system})" if system else ""
        raise CheckpointError(f"{name}: the weights do not fit the model{origin}: {'; '.join(filter(None, problems))}")
    model.load_state_dict(theirs, strict=False)


def _listed(what: str, items: list[str], shown: int = 5) -> str:
    if not items:
        return ""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return f"{len(items)} {what}: {', '.join(items[:shown])}{more}"
