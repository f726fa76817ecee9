# SPDX-License-Identifier: Apache-2.0
"""Several ways to compute the same thing, against each other and against the machine's measured peaks.

A file of benchmarks/ops yields its cases from `cases(quick)`, which runs with torch's default device set: a tensor made
without `device=` lies where the benchmark runs. `on_gpu()` tells, for sizes, bars and peers that depend on it. On a GPU
the harness adds the same way as a CUDA graph and, beside compiled kernels, on Triton.
"""

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.timing import Peaks, Times, Ways, graphed, measure, name
from pyvseg.ops import _dispatch
from pyvseg.ops._measured import write_whole


def on_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


@dataclass(frozen=True)
class Case:
    """One problem and the ways to solve it; the first way is the baseline that ratios are over."""

    op: str
    name: str
    ways: Ways
    bytes: float  # every input read once, every output written once
    flops: float
    dtype: torch.dtype = torch.float32  # picks the arithmetic peak
    bars: dict[tuple[str, str], float] = field(default_factory=dict)  # (way, than): least ratio that we hold ourselves to
    way_bytes: dict[str, float] = field(default_factory=dict)  # of ways that start from another form of the inputs


@dataclass(frozen=True)
class Row:
    op: str
    case: str
    way: str
    ms: float  # median
    p10: float
    p90: float
    cpu_ms: float  # median over all threads; says more than the others on a busy machine
    gigabytes_per_second: float
    gigaflops: float
    share_of_roofline: float
    ratio: float  # baseline's time over this one's


def least_seconds(case: Case, way: str, peak: Peaks) -> float:
    """What the case's bytes and flops take at the machine's peaks."""
    return max(case.way_bytes.get(way, case.bytes) / peak.copy, case.flops / peak.gemm[name(case.dtype)])


def ways_on(case: Case, device: str) -> Ways:
    """The ways of the case that run on this device, and their forms that only a GPU has; failures are told, not raised."""
    ways = dict(case.ways)
    if device == "cuda":
        if not any(_dispatch.missing(case.op, backend) for backend in ("cuda", "triton")):
            ways |= {f"{way}, triton": _on_backend(run, "triton") for way, run in case.ways.items() if _ours(way)}
        usable = {way: run for way, run in ways.items() if _runs(way, run)}
        for way, run in usable.items():
            if way == next(iter(case.ways)) or _ours(way):
                usable = usable | _as_graph(way, run)
        return usable
    return ways


def _ours(way: str) -> bool:
    return way.startswith("pyvseg") and "reference" not in way and "torch.compile" not in way


def _on_backend(run: Callable[[], object], backend: str) -> Callable[[], object]:
    def forced() -> object:
        with _dispatch.backend(backend):
            return run()

    return forced


def _runs(way: str, run: Callable[[], object]) -> bool:
    try:
        run()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"  {way} FAILED: {first_line(error)}", file=sys.stderr)
        return False
    return True


def _as_graph(way: str, run: Callable[[], object]) -> Ways:
    try:
        return {f"{way}, CUDA graph": graphed(run)}
    except Exception as error:
        torch.cuda.synchronize()
        print(f"  {way}: no CUDA graph: {first_line(error)}", file=sys.stderr)
        return {}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def rows_of(case: Case, peak: Peaks, budget: float, rounds: int, device: str = "cpu") -> list[Row]:
    times: Times = measure(ways_on(case, device), budget, rounds, device)
    walls = {way: sorted(wall for wall, _ in seconds) for way, seconds in times.items()}
    first = next(iter(case.ways))
    baseline = statistics.median(walls[first]) if first in walls else float("nan")
    rows = []
    for way, wall in walls.items():
        median = statistics.median(wall)
        low, high = (wall[round(q * (len(wall) - 1))] for q in (0.1, 0.9))
        cpu = statistics.median(cpu for _, cpu in times[way])
        traffic = case.way_bytes.get(way, case.bytes)
        rows.append(
            Row(case.op, case.name, way, median * 1e3, low * 1e3, high * 1e3, cpu * 1e3, traffic / median / 1e9,
                case.flops / median / 1e9, least_seconds(case, way, peak) / median, baseline / median)
        )  # fmt: skip
    return rows


def choice_of(case: Case, device: str, budget: float, rounds: int) -> dict | None:
    """A row of `pyvseg.ops._measured`: the backends against each other on the case's first way that is ours."""
    ours = next((run for way, run in case.ways.items() if _ours(way)), None)
    if ours is None:
        return None
    with _dispatch.recorded() as calls, _dispatch.backend("auto"):
        ours()
    if not calls:
        return None
    op, _, dtype, elements = max(calls, key=lambda call: call[3])
    backends = [b for b in (("cuda", "triton") if device == "cuda" else ("cpu",)) if not _dispatch.missing(op, b)]
    ways = {b: _on_backend(ours, b) for b in (*backends, "reference")}
    if device == "cuda":
        ways = {b: run for b, run in ways.items() if _runs(b, run)}
    ms = {b: min(wall for wall, _ in times) * 1e3 for b, times in measure(ways, budget, rounds, device).items()}
    best = min(ms, key=ms.get)
    usual = next(iter(ms))
    return {
        "op": op, "device": device, "dtype": name(dtype), "elements": elements,
        "backend": best if ms[best] < 0.95 * ms[usual] else usual,  # a near tie is none
        "ms": {b: float(f"{x:.4g}") for b, x in ms.items()},
        "case": case.name, "machine": machine_name(device), "torch": torch.__version__,
    }  # fmt: skip


def bars_of(case: Case, rows: list[Row]) -> list[str]:
    """One line for every bar of the case: met or missed, and by how much."""
    ms = {row.way: row.ms for row in rows}
    lines = []
    for (way, than), least in case.bars.items():
        if way not in ms or than not in ms:
            lines.append(f"MISSED {way} against {than}: did not run")
            continue
        ratio = ms[than] / ms[way]
        lines.append(f"{'met   ' if ratio >= least else 'MISSED'} {way}: {ratio:.1f}x {than}, at least {least:g}x wanted")
    return lines


def machine_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return f"{cpu}, {_dispatch.extension.isa()}" if _dispatch.extension else cpu


def machine(threads: int, device: str = "cpu") -> dict[str, str]:
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    gpu = {"gpu": machine_name("cuda"), "CUDA": str(torch.version.cuda)} if device == "cuda" else {}
    return gpu | {
        "cpu": machine_name("cpu"),
        "threads": str(threads),
        "torch": torch.__version__,
        "commit": commit or "unknown",
        "load": f"{os.getloadavg()[0]:.1f}",
    }


COLUMNS = ("way", "ms", "p10", "p90", "CPU ms", "GB/s", "TFLOP/s", "of roofline", "ratio")


def cells(row: Row) -> tuple[str, ...]:
    return (row.way, f"{row.ms:.3f}", f"{row.p10:.3f}", f"{row.p90:.3f}", f"{row.cpu_ms:.3f}", f"{row.gigabytes_per_second:.1f}",
            f"{row.gigaflops / 1e3:.3g}", f"{row.share_of_roofline:.0%}", f"{row.ratio:.1f}x")  # fmt: skip


def table(case: Case, rows: list[Row], bars: list[str]) -> str:
    """For a terminal."""
    lines = [COLUMNS, *(cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]) for line in lines
    ]
    return "\n".join([f"{case.op}: {case.name}", *(f"  {line}" for line in aligned), *(f"  {line}" for line in bars), ""])


Result = tuple[Case, list[Row], list[str]]


def write(out: Path, facts: dict[str, str], peak: Peaks, results: list[Result], stem: str = "results") -> None:
    """STEM.json and STEM.md in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": facts, "peaks": asdict(peak), "rows": [asdict(row) for _, rows, _ in results for row in rows]}
    write_whole(out / f"{stem}.json", json.dumps(record, indent=1) + "\n")
    lines = ["# Benchmark", "", *(f"- {name}: {fact}" for name, fact in facts.items()), f"- {describe(peak)}", ""]
    lines += ["| op | case | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    lines += [f"| {row.op} | {row.case} | {' | '.join(cells(row))} |" for _, rows, _ in results for row in rows]
    lines += ["", *(f"- {case.op}, {case.name}: {line}" for case, _, bars in results for line in bars), ""]
    write_whole(out / f"{stem}.md", "\n".join(lines))


def file_stem(facts: dict[str, str]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()) if "gpu" in facts else "results"


def describe(peak: Peaks) -> str:
    gemm = ", ".join(f"{dtype} matrix product {flops / 1e12:.2f} TFLOP/s" for dtype, flops in peak.gemm.items())
    return f"measured peaks: memory copy {peak.copy / 1e9:.1f} GB/s, {gemm}"
