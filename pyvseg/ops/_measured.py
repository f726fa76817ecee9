# SPDX-License-Identifier: Apache-2.0
"""Which backend was measured as the fastest: the rows of measured.json, written by `python -m benchmarks --write-choice`.

A row says for an op, device, dtype and number of elements (of the tensors that the op hands to `_dispatch.choose`) how many
milliseconds each backend took, on which machine and for which benchmark case. A call goes by the row that is nearest in
size, of the same GPU model if there are any. Where no row is, the order stands: compiled, then Triton, then the reference.
"""

import functools
import json
import math
from pathlib import Path

import torch

FILE = Path(__file__).with_name("measured.json")


def rows() -> list[dict]:
    return json.loads(FILE.read_text()) if FILE.exists() else []


@torch.compiler.assume_constant_result
def ranges(op: str, device: str, dtype: torch.dtype) -> tuple[tuple[float, str], ...]:
    """(elements up to here, fastest backend), ascending, the last without limit; empty where nothing was measured."""
    return _ranges(op, device, dtype)


@functools.cache
def _ranges(op: str, device: str, dtype: torch.dtype) -> tuple[tuple[float, str], ...]:
    found = [row for row in rows() if (row["op"], row["device"], row["dtype"]) == (op, device, str(dtype).removeprefix("torch."))]
    if device == "cuda":
        here = torch.cuda.get_device_name()
        found = [row for row in found if row["machine"] == here] or found
    found.sort(key=lambda row: row["elements"])
    limits: list[tuple[float, str]] = []
    for row, after in zip(found, [*found[1:], None]):
        limit = math.sqrt(row["elements"] * after["elements"]) if after else math.inf
        if limits and limits[-1][1] == row["backend"]:
            limits.pop()
        limits.append((limit, row["backend"]))
    return tuple(limits)


def summary() -> str:
    """For `pyvseg info`: what the choice rests on."""
    measured = {device: sorted({row["machine"] for row in rows() if row["device"] == device}) for device in ("cpu", "cuda")}
    parts = [f"{name}: {', '.join(measured[device]) or 'nothing measured'}" for device, name in (("cpu", "CPU"), ("cuda", "GPU"))]
    return "; ".join(parts)


def write(new: list[dict]) -> None:
    """Replaces what the same machines measured before of the same problems."""
    key = lambda row: (row["op"], row["device"], row["machine"], row["dtype"], row["elements"])  # noqa: E731
    merged = {key(row): row for row in (*rows(), *new)}
    lines = ",\n".join(json.dumps(merged[each]) for each in sorted(merged))
    write_whole(FILE, f"[\n{lines}\n]\n")


def write_whole(file: Path, text: str) -> None:
    """The old content or the new, whenever the process ends."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    new.replace(file)
