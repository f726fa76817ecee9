# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the op tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from pyvseg.ops import _dispatch
from tests.cuda import emulator
from tests.ops.implementations import Implementation

ISAS = _dispatch.extension.isas() if _dispatch.extension else []


@contextmanager
def _on_isa(name: str) -> Iterator[None]:
    before = _dispatch.extension.isa()
    _dispatch.extension.set_isa(name)
    try:
        yield
    finally:
        _dispatch.extension.set_isa(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    """Runs a test once on every instruction set that this CPU has."""
    with _on_isa(request.param):
        yield request.param


@pytest.fixture
def emulated() -> None:
    """Builds and loads `torch.ops.pyvseg_emulated`, the CUDA kernels on CPU tensors; skips where that cannot be."""
    if reason := emulator.unavailable():
        pytest.skip(f"no emulator of CUDA kernels: {reason}")
    emulator.load()


@pytest.fixture
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """What `implementations(op)` lists; `backend=implementation.backend` reaches it, also in a backward."""
    chosen: Implementation = request.param
    if chosen.name == "cuda-emulated":
        request.getfixturevalue("emulated")
        monkeypatch.setitem(_dispatch._libraries, "cpu", "pyvseg_emulated")
    if chosen.isa is None:
        yield chosen
    else:
        with _on_isa(chosen.isa):
            yield chosen


@pytest.fixture(autouse=True)
def kernels_at_any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small problems with gradients go to our kernels too, which `auto` leaves to PyTorch for speed."""
    monkeypatch.setattr(_dispatch, "_is_small", lambda *_: False)
    _dispatch.forget()
    yield
    _dispatch.forget()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
