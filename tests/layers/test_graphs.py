# SPDX-License-Identifier: Apache-2.0
"""Methods as CUDA graphs: which calls are captured, and that results are those of the method."""

import weakref
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pyvseg.layers import graphs
from pyvseg.layers.graphs import graphed
from pyvseg.layers.transfer import made_once


class Result(NamedTuple):
    one: Tensor
    more: list[Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 3), 0

    def encode(self, x: Tensor) -> Result:
        self.calls += 1
        y = self.linear(x)
        return Result(y, [y.relu(), 2 * x])


def equal(a: Result, b: Result) -> bool:
    return isinstance(a, Result) and all(torch.equal(x, y) for x, y in zip((a.one, *a.more), (b.one, *b.more), strict=True))


def emulated(method, inputs, memory=None):
    """What a capture gives, without a GPU: a replay computes from the same inputs into the same outputs."""
    outputs = method(*inputs)

    @torch.inference_mode()
    def replay():
        new = method(*inputs)
        for old, each in zip((outputs.one, *outputs.more), (new.one, *new.more)):
            old.copy_(each)

    return replay, outputs


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(graphs, "_applies", lambda tensors: True)
    monkeypatch.setattr(graphs, "_Memory", lambda device: "memory")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))


@torch.inference_mode()
def test_from_the_second_call_of_a_shape_on(on_gpu, monkeypatch):
    captured = []
    monkeypatch.setattr(graphs, "_capture", lambda method, inputs, memory: captured.append(inputs[0].shape) or emulated(method, inputs))
    net = Net()
    inputs = [torch.randn(rows, 4) for rows in (2, 2, 5, 2, 5, 2)]
    results = [graphed(net.encode, x) for x in inputs]
    assert captured == [(2, 4), (5, 4)]
    assert all(equal(result, net.encode(x)) for result, x in zip(results, inputs))  # earlier ones were not written over
    net.linear.weight = nn.Parameter(torch.randn(3, 4))
    for _ in range(2):
        assert equal(graphed(net.encode, inputs[0]), net.encode(inputs[0]))
    del captured[:]
    for rows in range(1, 20):  # the graph that is in use outlives others
        for x in (torch.randn(rows, 4), torch.randn(rows, 4), inputs[0]):
            graphed(net.encode, x)
    assert captured.count((2, 4)) == 0 and len(captured) == 18 and len(graphs._graphs[net][0].found) == graphs.KEPT


def test_a_graph_serves_inference_mode_and_no_grad(on_gpu, monkeypatch):
    monkeypatch.setattr(graphs, "_capture", emulated)
    net = Net()
    with torch.inference_mode():
        results = [graphed(net.encode, torch.ones(2, 4)) for _ in range(2)]
    with torch.no_grad():
        assert equal(results[1], graphed(net.encode, torch.ones(2, 4)))


@made_once(1)
def ramp(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32)


class Placed(nn.Linear):
    def encode(self, x: Tensor) -> Tensor:
        return self(x) + ramp(3)


@torch.inference_mode()
def test_a_graph_holds_the_constants_that_it_reads(on_gpu, monkeypatch):
    monkeypatch.setattr(graphs, "_capture", lambda method, inputs, memory: (lambda: None, method(*inputs)))
    net = Placed(4, 3)
    for _ in range(2):
        graphed(net.encode, torch.ones(2, 4))
    kept = weakref.ref(ramp(3))
    ramp(4)
    assert kept() is not None
    del net
    assert kept() is None


@torch.inference_mode()
def test_where_no_graph_can_be_had(on_gpu, monkeypatch):
    def fails(method, inputs, memory):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "_capture", fails)
    net, x = Net(), torch.randn(2, 4)
    graphed(net.encode, x)
    with pytest.warns(UserWarning, match="Net.encode runs without a CUDA graph: operation not permitted when stream is capturing$"):
        assert equal(graphed(net.encode, x), net.encode(x))
    assert equal(graphed(net.encode, x), net.encode(x))
    kept = weakref.ref(net)
    del net
    assert kept() is None  # nothing here holds a model that nobody uses


def test_on_a_cpu_nothing_is_captured():
    net, x = Net(), torch.randn(2, 4)
    for _ in range(3):
        assert equal(graphed(net.encode, x), net.encode(x))
    assert net not in graphs._graphs and net.calls == 6


@pytest.mark.gpu
@torch.inference_mode()
def test_on_a_gpu():
    net = Net().cuda()
    for rows in (2, 2, 5, 2, 5, 5):
        x = torch.randn(rows, 4, device="cuda")
        assert equal(graphed(net.encode, x), net.encode(x))
    (kept,) = graphs._graphs[net].values()
    assert len(kept.found) == 2 and all(map(callable, kept.found.values()))


@pytest.mark.gpu
@torch.inference_mode()
def test_on_a_gpu_a_capture_that_fails_leaves_the_stream_as_it_was():
    class Waits(Net):
        def encode(self, x: Tensor) -> Result:
            return super().encode(x * x.sum().item())

    net, x, before = Waits().cuda(), torch.randn(2, 4, device="cuda"), torch.cuda.current_stream()
    graphed(net.encode, x)
    with pytest.warns(UserWarning, match="runs without a CUDA graph"):
        assert equal(graphed(net.encode, x), net.encode(x))
    assert torch.cuda.current_stream() == before and equal(graphed(net.encode, x), net.encode(x))
