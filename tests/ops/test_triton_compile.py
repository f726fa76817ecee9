# SPDX-License-Identifier: Apache-2.0
"""Triton kernels compile for every GPU generation that the CUDA kernels are built for; no GPU is needed."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes of shared memory that a block may have
FILES = sorted(file.stem for file in ROOT.glob("kernels/*.py") if "\ndef " in file.read_text().replace("\n@triton.jit\ndef ", ""))


@functools.cache
def compiled() -> dict[int, tuple[str, str]]:
    """What tests/ops/triton_compile.py says of each generation, and its errors; both run at once."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.triton_compile"]
    started = {gpu: subprocess.Popen([*command, str(gpu)], env=environment, cwd=ROOT, stdout=-1, stderr=-1, text=True) for gpu in SHARED}
    return {gpu: process.communicate() for gpu, process in started.items()}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("file", FILES)
def test_compiles(file, capability):
    output, errors = compiled()[capability]
    assert output, errors[-3000:]
    kernels = json.loads(output)[file]
    assert kernels["shared"] and max(kernels["shared"].values()) <= SHARED[capability], "shared memory of a block"
    assert not kernels["left"], "kernels that no call launches"
