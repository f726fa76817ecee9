# SPDX-License-Identifier: Apache-2.0
import argparse
import dataclasses
import importlib
import pkgutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import benchmarks.ops
from benchmarks import harness, timing
from pyvseg.ops import _measured

THERE = [module.name for module in pkgutil.iter_modules(benchmarks.ops.__path__)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Times the ops against published formulations and peers, all in one run."
    )
    parser.add_argument("names", nargs="*", metavar="op", help=f"all by default: {', '.join(THERE)}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, no torch.compile")
    parser.add_argument("--only", default="", help="text that a case's name must contain")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of timing per case")
    parser.add_argument("--rounds", type=int, default=50, help="at most so many; every way runs once per round")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of the whole run; later cases are left out")
    parser.add_argument("--out", type=Path, help="folder for results.json and results.md, or those of the GPU's name")
    parser.add_argument("--write-choice", action="store_true", help="note the fastest backend of each case in pyvseg/ops/measured.json")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in THERE]:
        parser.error(f"no op named {unknown[0]}; there are {', '.join(THERE)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    return args


def cases(names: list[str], quick: bool, only: str, device: str) -> Iterator[harness.Case]:
    """Op by op; on a GPU one case of each op in turn and torch.compile, which takes longer than all else, for the first case
    of each op at the very end: a run that ends early has seen all ops."""
    torch.manual_seed(0)
    if device != "cuda":
        for name in names:
            yield from _in_turn([name], quick, only, device)
        return
    later: dict[str, harness.Case] = {}
    for case in _in_turn(names, quick, only, device):
        compiled = {way: case.ways.pop(way) for way in list(case.ways) if "torch.compile" in way}
        if compiled and case.op not in later:
            baseline, ours = next(iter(case.ways)), next(way for way in case.ways if way.startswith("pyvseg"))
            ways = {way: case.ways[way] for way in (baseline, ours)} | compiled
            later[case.op] = dataclasses.replace(case, name=f"{case.name}, and torch.compile", ways=ways, bars={})
        yield case
    yield from later.values()


def _in_turn(names: list[str], quick: bool, only: str, device: str) -> Iterator[harness.Case]:
    open_files = {name: None for name in names}
    while open_files:
        for name in list(open_files):
            try:
                with torch.device(device):
                    open_files[name] = open_files[name] or importlib.import_module(f"benchmarks.ops.{name}").cases(quick)
                    case = next(open_files[name], None)
            except Exception as error:
                print(f"{name}: its cases cannot be made: {type(error).__name__}: {error}", file=sys.stderr)
                case = None
            if case is None:
                del open_files[name]
            elif only in case.name:
                yield case


def main() -> int:
    args, start = parse(), time.monotonic()
    torch.set_num_threads(args.threads)
    facts, peak = harness.machine(args.threads, args.device), timing.peaks(args.device)
    print(", ".join(f"{name} {fact}" for name, fact in facts.items()))
    print(harness.describe(peak), flush=True)
    results: list[harness.Result] = []
    left_out, failed, stem = 0, False, harness.file_stem(facts)
    for case in cases(args.names or THERE, args.quick, args.only, args.device):
        if time.monotonic() - start > args.seconds:
            left_out += 1
            continue
        try:
            rows = harness.rows_of(case, peak, args.budget, args.rounds, args.device)
        except (ImportError, RuntimeError) as error:  # a peer or memory that is not there must not end the run
            print(f"{case.op}: {case.name} FAILED: {harness.first_line(error)}", file=sys.stderr)
            failed = True
            continue
        bars = harness.bars_of(case, rows)
        failed |= not {way for way in case.ways if way.startswith("pyvseg")} <= {row.way for row in rows}
        print(harness.table(case, rows, bars), flush=True)
        results.append((case, rows, bars))
        if args.out:  # after every case: whatever ends the run, what was measured stays
            harness.write(args.out, facts, peak, results, stem)
        if args.write_choice and (choice := harness.choice_of(case, args.device, args.budget / 3, args.rounds)):
            _measured.write([choice])
    if left_out:
        print(f"{left_out} cases left out: --seconds {args.seconds:g} were over")
    if args.write_choice:
        print(f"written: {_measured.FILE}")
    if args.out:
        print(f"written: {args.out / stem}.json and .md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
