# SPDX-License-Identifier: Apache-2.0
"""Triton kernels compile for every GPU generation that the CUDA kernels are built for."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes of shared memory that a block may have


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("op", ["ms_deform_attn"])
def test_compiles(op, capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.triton_compile", str(capability), op]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    kernels = json.loads(done.stdout)
    assert kernels and all(k["cubin"] > 0 and k["shared"] <= SHARED[capability] for k in kernels)
