# SPDX-License-Identifier: Apache-2.0
"""No CUDA kernel may keep registers in memory, on any GPU that it is compiled for."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyvseg.ops import _dispatch

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = {"sm_80", "sm_86", "sm_90"}
SPILLS_ALLOWED: dict[str, str] = {}  # part of a kernel's mangled name -> why


def logs() -> list[Path]:
    """What ptxas said of each file of csrc/cuda that the build in use compiled."""
    if not _dispatch.extension or not _dispatch.extension.build_facts()["cuda"]:
        pytest.skip("built without CUDA (no nvcc at build time)")
    objects = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}" / "CMakeFiles/_C_cuda.dir/csrc/cuda"
    if not objects.exists():
        pytest.skip(f"this installation was not built in {ROOT}")
    return [objects / f"{source.name}.o.ptxas" for source in sorted(ROOT.glob("csrc/cuda/*.cu"))]


def spills(log: str) -> dict[tuple[str, str], int]:
    """(kernel, architecture) -> bytes stored to and loaded from memory for want of registers."""
    found: dict[tuple[str, str], int] = {}
    kernel = ("", "")
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel = (entry[1], entry[2])
        elif count := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[kernel] = found.get(kernel, 0) + int(count[1]) + int(count[2])
    return found


def readable(kernel: str) -> str:
    return subprocess.run(["c++filt", kernel], capture_output=True, text=True, check=False).stdout.strip() if shutil.which("c++filt") else kernel


def test_no_kernel_spills():
    found: dict[tuple[str, str], int] = {}
    for log in logs():
        assert log.exists(), f"{log} is missing: compile again"
        found |= spills(log.read_text())
    bad = {
        f"{readable(kernel)} on {gpu}": count
        for (kernel, gpu), count in found.items()
        if count and not any(part in kernel for part in SPILLS_ALLOWED)
    }
    assert not bad
    kernels = {kernel for kernel, _ in found}
    missing = {(kernel, gpu) for kernel in kernels for gpu in ARCHITECTURES} - found.keys()
    assert not missing, "kernels that ptxas did not report on"


def test_a_spill_is_seen():
    log = """ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'
ptxas info    : Function properties for _Z1kv
    72 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Compiling entry function '_Z1gv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"""
    assert spills(log) == {("_Z1kv", "sm_80"): 20, ("_Z1gv", "sm_80"): 0}
