# SPDX-License-Identifier: Apache-2.0
"""Timing of several ways to compute the same thing, against each other and against the machine's measured peaks."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Case:
    """One problem and the ways to solve it; the first way is the baseline that ratios are over."""

    op: str
    name: str
    ways: dict[str, Callable[[], object]]
    bytes: float  # every input read once, every output written once
    flops: float
    dtype: torch.dtype = torch.float32  # picks the arithmetic peak
    bars: dict[tuple[str, str], float] = field(default_factory=dict)  # (way, than): least ratio that we hold ourselves to
    way_bytes: dict[str, float] = field(default_factory=dict)  # of ways that start from another form of the inputs


@dataclass(frozen=True)
class Peaks:
    copy: float  # bytes read plus written per second, from and to memory
    gemm: dict[str, float]  # dtype -> flops per second

    def seconds(self, case: Case, way: str) -> float:
        """The least time that the case's bytes and flops take."""
        return max(case.way_bytes.get(way, case.bytes) / self.copy, case.flops / self.gemm[_name(case.dtype)])


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(ways: dict[str, Callable[[], object]], budget: float, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(Wall, CPU) seconds per call. Rounds go through all ways in turn, so that a busy moment hits every way alike."""
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for run in ways.values():
        run()
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > budget:
            break
        for way, run in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            times[way].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def peaks(rounds: int = 7) -> Peaks:
    """The arithmetic peak is the better of MKL's matrix product and oneDNN's 3x3 convolution, which on AMD's AVX-512 is
    twice as fast in float32."""
    source, target = torch.rand(1 << 26), torch.empty(1 << 26)
    size, width, side = 2048, 512, 64
    ways: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    flops: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix, out = torch.randn(size, size).to(dtype), torch.empty(size, size, dtype=dtype)
        ways[f"{_name(dtype)} mkl"] = lambda matrix=matrix, out=out: torch.mm(matrix, matrix, out=out)
        flops[f"{_name(dtype)} mkl"] = 2 * size**3
        image, weight = torch.randn(1, width, side, side).to(dtype), torch.randn(width, width, 3, 3).to(dtype)
        image, weight = (t.contiguous(memory_format=torch.channels_last) for t in (image, weight))
        ways[f"{_name(dtype)} onednn"] = lambda image=image, weight=weight: F.conv2d(image, weight)
        flops[f"{_name(dtype)} onednn"] = 2 * 9 * width * width * (side - 2) ** 2
    best = {way: min(seconds)[0] for way, seconds in measure(ways, 20, rounds).items()}
    copy = 2 * source.numel() * 4 / best.pop("copy")
    rates = {way: flops[way] / seconds for way, seconds in best.items()}
    return Peaks(copy, {n: max(rates[f"{n} mkl"], rates[f"{n} onednn"]) for n in ("float32", "bfloat16")})


def rows_of(case: Case, peak: Peaks, budget: float, rounds: int) -> list[Row]:
    times = measure(case.ways, budget, rounds)
    walls = {way: sorted(wall for wall, _ in seconds) for way, seconds in times.items()}
    baseline = statistics.median(next(iter(walls.values())))
    rows = []
    for way, wall in walls.items():
        median = statistics.median(wall)
        low, high = (wall[round(q * (len(wall) - 1))] for q in (0.1, 0.9))
        cpu = statistics.median(cpu for _, cpu in times[way])
        traffic = case.way_bytes.get(way, case.bytes)
        rows.append(
            Row(case.op, case.name, way, median * 1e3, low * 1e3, high * 1e3, cpu * 1e3, traffic / median / 1e9,
                case.flops / median / 1e9, peak.seconds(case, way) / median, baseline / median)
        )  # fmt: skip
    return rows


def bars_of(case: Case, rows: list[Row]) -> list[str]:
    """One line for every bar of the case: met or missed, and by how much."""
    ms = {row.way: row.ms for row in rows}
    lines = []
    for (way, than), least in case.bars.items():
        ratio = ms[than] / ms[way]
        lines.append(f"{'met   ' if ratio >= least else 'MISSED'} {way}: {ratio:.1f}x {than}, at least {least:g}x wanted")
    return lines


def machine(threads: int) -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    from pyvseg.ops import _dispatch

    return {
        "cpu": cpu,
        "threads": str(threads),
        "instruction set": _dispatch.extension.isa() if _dispatch.extension else "none (reference only)",
        "torch": torch.__version__,
        "commit": commit or "unknown",
        "load": f"{os.getloadavg()[0]:.1f}",
    }


COLUMNS = ("way", "ms", "p10", "p90", "CPU ms", "GB/s", "GFLOP/s", "of roofline", "ratio")


def cells(row: Row) -> tuple[str, ...]:
    return (row.way, f"{row.ms:.2f}", f"{row.p10:.2f}", f"{row.p90:.2f}", f"{row.cpu_ms:.2f}", f"{row.gigabytes_per_second:.1f}",
            f"{row.gigaflops:.1f}", f"{row.share_of_roofline:.0%}", f"{row.ratio:.1f}x")  # fmt: skip


def show(console: Console, case: Case, rows: list[Row], bars: list[str]) -> None:
    table = Table(title=f"{case.op}: {case.name}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    for line in bars:
        console.print(line, style="red" if line.startswith("MISSED") else "green", highlight=False)


def write(out: Path, facts: dict[str, str], peak: Peaks, results: list[tuple[Case, list[Row], list[str]]]) -> None:
    """results.json and results.md in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": facts, "peaks": asdict(peak), "rows": [asdict(row) for _, rows, _ in results for row in rows]}
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = ["# Benchmark", "", *(f"- {name}: {fact}" for name, fact in facts.items()), f"- {describe(peak)}", ""]
    for case, rows, bars in results:
        lines += [f"## {case.op}: {case.name}", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
        lines += ["", *(f"- {line}" for line in bars), ""]
    (out / "results.md").write_text("\n".join(lines))


def describe(peak: Peaks) -> str:
    gemm = ", ".join(f"{name} matrix product {flops / 1e9:.0f} GFLOP/s" for name, flops in peak.gemm.items())
    return f"measured peaks: memory copy {peak.copy / 1e9:.1f} GB/s, {gemm}"
