# SPDX-License-Identifier: Apache-2.0
import platform
from dataclasses import dataclass
from importlib import metadata

from rich.console import Console
from rich.table import Table


@dataclass
class Info:
    """Versions, the instruction set in use, what was compiled, and which backends each op has here and why not others."""


def info(options: Info | None = None) -> None:
    import torch

    from pyvseg import ops
    from pyvseg.ops import _dispatch, _measured

    console = Console(highlight=False)
    extension = _dispatch.extension
    facts = extension.build_facts() if extension else {}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows = [
        ("pyvseg", metadata.version("pyvseg")),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("compiled with", f"{facts['compiler']}, torch {facts['torch']}" if facts else "not compiled"),
        ("instruction set", f"{extension.isa()} in use; {', '.join(extension.isas())} here" if extension else "none"),
        ("CUDA kernels", facts.get("cuda") or "not compiled"),
        ("GPU", gpu),
        ("choice of backend", f"by measurements on {_measured.summary()}"),
    ]
    versions = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        versions.add_row(*row)
    console.print(versions)
    backends = Table(*("op", *_dispatch.BACKENDS), box=None, pad_edge=False)
    reasons: dict[str, None] = {}
    cells: dict[str, list[str]] = {}
    for op, backend, available, reason in ops.report():
        cells.setdefault(op, []).append("yes" if available else "-")
        if reason:
            reasons[f"{backend}: {reason}"] = None
    for op, row in cells.items():
        backends.add_row(op, *row)
    console.print()
    console.print(backends)
    for reason in reasons:
        console.print(f"- {reason}", soft_wrap=True)
