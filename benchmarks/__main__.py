# SPDX-License-Identifier: Apache-2.0
import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

import benchmarks.ops
from benchmarks import harness


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    threads: int = 2,
    quick: bool = False,
    only: str = "",
    budget: Annotated[float, tyro.conf.arg(help="seconds of timing per case")] = 15.0,
    rounds: int = 50,
    out: Path | None = None,
) -> None:
    """Time the ops against published formulations and peers, all in one run.

    Args:
        names: ops to time; all without one.
        threads: of PyTorch.
        quick: fewer sizes, no torch.compile.
        only: text that a case's name must contain.
        rounds: at most so many; every way runs once per round.
        out: folder for results.json and results.md.
    """
    there = [module.name for module in pkgutil.iter_modules(benchmarks.ops.__path__)]
    if unknown := [name for name in names if name not in there]:
        sys.exit(f"benchmarks: no op named {unknown[0]}; there are {', '.join(there)}")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    console = Console(width=max(Console().width, 120))  # tables keep their figures in a pipe
    facts, peak = harness.machine(threads), harness.peaks()
    console.print(", ".join(f"{name} {fact}" for name, fact in facts.items()), highlight=False)
    console.print(harness.describe(peak), highlight=False)
    results = []
    for name in names or there:
        for case in importlib.import_module(f"benchmarks.ops.{name}").cases(quick):
            if only not in case.name:
                continue
            rows = harness.rows_of(case, peak, budget, rounds)
            bars = harness.bars_of(case, rows)
            harness.show(console, case, rows, bars)
            results.append((case, rows, bars))
    if out:
        harness.write(out, facts, peak, results)
        console.print(f"written: {out / 'results.json'}, {out / 'results.md'}", highlight=False)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks")
