# SPDX-License-Identifier: Apache-2.0
"""The choice of backend follows the measurements."""

import json

import pytest
import torch

from pyvseg.ops import _dispatch, _measured

is_small = _dispatch._is_small  # before the tests' fixture turns it off


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(_measured, "FILE", tmp_path / "measured.json")
    _measured._ranges.cache_clear()
    yield
    _measured._ranges.cache_clear()


def row(elements: int, backend: str, **other) -> dict:
    usual = dict(op="memory_read", device="cpu", dtype="float32", machine="a", elements=elements, backend=backend)
    return usual | dict(ms={"cpu": 1.0}, case="", torch="") | other


def choose(elements: int, dtype: torch.dtype = torch.float32) -> str:
    return _dispatch.choose("memory_read", "auto", torch.empty(elements, dtype=dtype), slower="")


def test_nearest_measurement_decides(table):
    _measured.write([row(100, "reference"), row(10_000, "cpu"), row(1_000_000, "cpu"), row(5, "reference", op="mask_iou")])
    assert _measured.ranges("memory_read", "cpu", torch.float32) == ((1000.0, "reference"), (float("inf"), "cpu"))
    assert [choose(n) for n in (1, 999, 1001, 10**7)] == ["reference", "reference", "cpu", "cpu"]
    assert choose(1, torch.bfloat16) == "cpu"  # nothing measured: the order stands


def test_a_new_measurement_replaces_the_old(table):
    _measured.write([row(100, "reference"), row(100, "cpu", machine="b")])
    _measured.write([row(100, "cpu")])
    assert [(r["machine"], r["backend"]) for r in _measured.rows()] == [("a", "cpu"), ("b", "cpu")]


def test_choice_under_compile(table):
    _measured.write([row(100, "cpu")])
    compiled = torch.compile(lambda x: x + (1 if _dispatch.choose("memory_read", "auto", x, slower="") == "cpu" else 2), fullgraph=True)
    assert compiled(torch.zeros(3)).eq(1).all()


def test_calls_are_recorded(table):
    with _dispatch.recorded() as calls:
        choose(12)
    assert calls == [("memory_read", "cpu", torch.float32, 12)]


def test_the_table_in_the_package_is_sound():
    for each in _measured.rows():
        assert each["backend"] in each["ms"] and each["machine"] and each["case"], json.dumps(each)
        assert each["device"] in ("cpu", "cuda") and hasattr(torch, each["dtype"])


def test_small_gradients_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(_dispatch, "_is_small", is_small)
    choose = lambda n, few: _dispatch.choose("memory_read", "auto", torch.zeros(n, requires_grad=True), slower="", few=few)  # noqa: E731
    assert [choose(8, 8), choose(9, 8), choose(8, 0)] == ["reference", "cpu", "cpu"]
    with torch.no_grad():
        assert choose(8, 8) == "cpu"
