# SPDX-License-Identifier: Apache-2.0
"""Every implementation of an op that this machine can run, for tests to loop over.

    @pytest.mark.parametrize("implementation", implementations("memory_read"), indirect=True)
    def test_forward(implementation):
        key, value, query = implementation.place(...)
        out = memory_read(key, value, query, backend=implementation.backend)

On a machine without a GPU CUDA kernels run in the emulator and Triton kernels in Triton's interpreter, both on CPU tensors;
keep shapes tiny for them: `implementation.slow` tells. With a GPU the real ones run, and `pytest -m gpu` selects them.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyvseg.ops import _dispatch

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Implementation:
    name: str  # "cpu-avx512", "cuda", "cuda-emulated", "triton", "triton-interpreted"
    backend: str  # what to pass as `backend=`
    device: str = "cpu"
    isa: str | None = None

    @property
    def slow(self) -> bool:
        return self.name.endswith(("-emulated", "-interpreted"))

    def place(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors on the implementation's device; leaves that require gradients stay leaves."""
        return tuple(t.detach().to(self.device).requires_grad_(t.requires_grad) for t in tensors)


def implementations(op: str) -> list:
    """Parameters of the fixture `implementation`: those that have a kernel of this op in the sources."""
    isas = _dispatch.extension.isas() if _dispatch.extension else []
    found = [Implementation(f"cpu-{isa}", "cpu", isa=isa) for isa in isas if op in _cpu_ops()]
    if op in _cuda_ops():
        found.append(Implementation("cuda", "cuda", "cuda") if GPU else Implementation("cuda-emulated", "cpu"))
    if op in _triton_ops():
        found.append(Implementation("triton", "triton", "cuda") if GPU else Implementation("triton-interpreted", "triton"))
    return [pytest.param(each, id=each.name, marks=[pytest.mark.gpu] if each.device == "cuda" else []) for each in found]


def assert_replays(run: Callable[[], Sequence[Tensor]]) -> None:
    """A CUDA graph of the function gives what the function gives: it never waits for the host."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@functools.cache
def _cpu_ops() -> set[str]:
    return _named(r'm\.impl\("(\w+)"', "csrc/cpu/*.cpp")


@functools.cache
def _cuda_ops() -> set[str]:
    return _named(r'm\.impl\("(\w+)"', "csrc/cuda/*.cu")


@functools.cache
def _triton_ops() -> set[str]:
    return _named(r"^def (\w+)\(", "kernels/*.py")


def _named(pattern: str, files: str) -> set[str]:
    return {name for file in ROOT.glob(files) for name in re.findall(pattern, file.read_text(), re.MULTILINE)}
