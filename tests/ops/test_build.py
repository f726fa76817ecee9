# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: it is there, runs on every instruction set, and is chosen and reported as documented."""

import os
import subprocess
import sys

import pytest
import torch

from pyvseg import ops
from pyvseg.ops import _dispatch


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, check=False)


def test_extension_is_compiled():
    assert _dispatch.extension is not None, _dispatch._extension_missing
    assert "baseline" in _dispatch.extension.isas()


READ = """
import sys, torch
from pyvseg import ops
from pyvseg.ops import _dispatch
print(_dispatch.extension.isa())
generator = torch.Generator().manual_seed(1)
key, query = (torch.randn(1, n, 64, generator=generator) for n in (500, 90))
value = torch.randn(1, 2, 500, 96, generator=generator)
masks = torch.randn(9, 1000, generator=generator) > 0
torch.save([ops.memory_read(key, value, query, 20), ops.mask_iou(masks, masks)], sys.argv[1])
"""


@pytest.mark.parametrize("isa", _dispatch.extension.isas() if _dispatch.extension else [])
def test_environment_forces_the_instruction_set(isa, tmp_path):
    file = tmp_path / "result.pt"
    code = f"import sys; sys.argv.append({str(file)!r})\n{READ}"
    done = python(code, PYVSEG_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]
    read, iou = torch.load(file)
    generator = torch.Generator().manual_seed(1)
    key, query = (torch.randn(1, n, 64, generator=generator).double() for n in (500, 90))
    value = torch.randn(1, 2, 500, 96, generator=generator).double()
    masks = torch.randn(9, 1000, generator=generator) > 0
    exact = ops.memory_read(key, value, query, 20, backend="reference")
    assert (read.double() - exact).abs().max() < 2e-5
    assert torch.equal(iou, ops.mask_iou(masks, masks, backend="reference"))


def test_unknown_instruction_set_is_an_error():
    done = python("import pyvseg.ops", PYVSEG_ISA="sse9")
    assert done.returncode != 0
    assert "PyvsegError: PYVSEG_ISA: unknown instruction set 'sse9'" in done.stderr


def test_unknown_backend_in_the_environment_is_an_error():
    done = python("import pyvseg.ops", PYVSEG_BACKEND="fpga")
    assert done.returncode != 0
    assert "PyvsegError: PYVSEG_BACKEND=fpga" in done.stderr


def test_backend_from_the_environment():
    code = "from pyvseg.ops import _dispatch as d; import torch; print(d.choose('memory_read', 'auto', torch.ones(1), slower=''))"
    assert python(code, PYVSEG_BACKEND="reference").stdout.split() == ["reference"]
    assert python(code).stdout.split() == ["cpu"]


def test_missing_extension_falls_back_with_one_warning():
    code = """
import sys, warnings
sys.modules["pyvseg._C"] = None
import torch
from pyvseg import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        out = ops.memory_read(torch.ones(1, 4, 8), torch.ones(1, 1, 4, 3), torch.ones(1, 2, 8))
assert torch.equal(out, torch.ones(1, 1, 2, 3))
assert not any(there for op, backend, there, _ in ops.report() if backend == "cpu")
print(len(caught), caught[0].message)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    count, message = done.stdout.split(maxsplit=1)
    assert count == "1"
    assert "memory_read runs on the PyTorch reference" in message and "slower" in message and "pyvseg._C" in message


def test_report_names_every_op_and_backend():
    rows = {(op, backend): (there, reason) for op, backend, there, reason in ops.report()}
    for op in ("memory_read", "mask_iou"):
        assert rows[op, "reference"] == (True, "")
        assert rows[op, "cpu"] == (True, "")
    assert all(there != bool(reason) for there, reason in rows.values())


def test_context_manager_nests_and_restores():
    choose = lambda: _dispatch.choose("memory_read", "auto", torch.ones(1), slower="")  # noqa: E731
    with ops.backend("reference"):
        assert choose() == "reference"
        with ops.backend("cpu"):
            assert choose() == "cpu"
        assert choose() == "reference"
    assert choose() == "cpu"
    with pytest.raises(ValueError, match="backend must be one of"), ops.backend("fpga"):
        pass


@pytest.mark.parametrize("name, error", [("cuda", ValueError), ("triton", ValueError), ("fpga", ValueError)])
def test_backend_that_cannot_serve_is_an_error(name, error, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(error, match="backend"):
        ops.memory_read(torch.ones(1, 4, 8), torch.ones(1, 1, 4, 3), torch.ones(1, 2, 8), backend=name)
