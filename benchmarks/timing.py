# SPDX-License-Identifier: Apache-2.0
"""Seconds per call on a CPU or a GPU, and what the machine allows at most."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Ways = dict[str, Callable[[], object]]
Times = dict[str, list[tuple[float, float]]]  # way -> (seconds, CPU seconds over all threads) of each call


@dataclass(frozen=True)
class Peaks:
    copy: float  # bytes read plus written per second, from and to memory
    gemm: dict[str, float]  # dtype -> flops per second


def measure(ways: Ways, budget: float, rounds: int, device: str = "cpu") -> Times:
    """Rounds go through all ways in turn, so that a busy moment hits every way alike. At least three, at most `budget` seconds."""
    once = _cuda_clock() if device == "cuda" else _cpu_once
    times: Times = {way: [] for way in ways}
    for run in ways.values():
        run()
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > budget:
            break
        for way, run in ways.items():
            times[way].append(once(run))
    return times


def _cpu_once(run: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def _cuda_clock() -> Callable:
    """Times by events, after everything else has left the L2 cache; the CPU seconds are those of queueing the work."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def once(run: Callable[[], object]) -> tuple[float, float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        flush.zero_()  # it also keeps the GPU busy while the first kernels are queued
        cpu = time.perf_counter()
        start.record()
        run()
        end.record()
        cpu = time.perf_counter() - cpu
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, cpu

    return once


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The same work as one CUDA graph: no time of the host in it. Raises RuntimeError where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peaks(device: str = "cpu", rounds: int = 7) -> Peaks:
    """The arithmetic peak is that of square matrix products; on a CPU the better of MKL's and oneDNN's 3x3 convolution,
    which on AMD's AVX-512 is twice as fast in float32."""
    source = torch.rand(1 << (28 if device == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    ways: Ways = {"copy": lambda: target.copy_(source)}
    flops: dict[str, float] = {}
    size, width, side = (8192 if device == "cuda" else 2048), 512, 64
    dtypes = (torch.float32, torch.bfloat16, *([torch.float16] if device == "cuda" else []))
    for dtype in dtypes:
        matrix = torch.randn(size, size, device=device).to(dtype)
        ways[f"{name(dtype)} mm"] = lambda matrix=matrix, out=torch.empty_like(matrix): torch.mm(matrix, matrix, out=out)
        flops[f"{name(dtype)} mm"] = 2 * size**3
        if device == "cuda":
            continue
        image, weight = torch.randn(1, width, side, side).to(dtype), torch.randn(width, width, 3, 3).to(dtype)
        image, weight = (t.contiguous(memory_format=torch.channels_last) for t in (image, weight))
        ways[f"{name(dtype)} conv"] = lambda image=image, weight=weight: F.conv2d(image, weight)
        flops[f"{name(dtype)} conv"] = 2 * 9 * width * width * (side - 2) ** 2
    best = {way: min(seconds)[0] for way, seconds in measure(ways, 20, rounds, device).items()}
    copy = 2 * source.numel() * 4 / best.pop("copy")
    rates = {way: flops[way] / seconds for way, seconds in best.items()}
    return Peaks(copy, {name(d): max(rate for way, rate in rates.items() if way.startswith(f"{name(d)} ")) for d in dtypes})


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
