# SPDX-License-Identifier: Apache-2.0
"""A GPU's way through Python on a machine without one: the CPU is taken for the GPU, and what PyTorch has for streams, events and
graphs is a stand-in that notes misuse. Kernels are those of the CPU, so that results are to the bit what they are without."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyvseg.engine import instances
from pyvseg.engine.tasks import instances as task
from pyvseg.layers import graphs, transfer
from pyvseg.models import video_instances, vos


class Stream:
    cuda_stream = 1

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)


class Event:
    def __init__(self, blocking: bool = False) -> None:
        self.recorded = self.waited = False

    def record(self, stream: Stream) -> None:
        self.recorded = isinstance(stream, Stream)

    def query(self) -> bool:
        """It takes as long as one is ready to wait."""
        return self.waited

    def synchronize(self) -> None:
        assert self.recorded
        self.waited = True


class Graph:
    """Replayed, it runs the method again, into the same outputs."""

    run: Callable[[], object]
    outputs: object

    @torch.inference_mode()
    def replay(self) -> None:
        for old, new in zip(tree_leaves(self.outputs), tree_leaves(self.run())):
            if isinstance(old, Tensor):
                old.copy_(new)


@pytest.fixture
def like_a_gpu(monkeypatch) -> list[str]:
    """The names of the methods that were captured."""
    captured, capture, work = [], graphs._capture, Stream()

    def noted(method, inputs, memory):
        captured.append(method.__name__)
        replay, outputs = capture(method, inputs, memory)
        replay.__self__.run, replay.__self__.outputs = lambda bare=method.__func__, module=method.__self__: bare(module, *inputs), outputs
        return replay, outputs

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        assert isinstance(stream, Stream) and pool is not None and capture_error_mode == "thread_local"
        yield

    for module in (graphs, instances, task, transfer, video_instances, vos):
        monkeypatch.setattr(module, "on_gpu", lambda device: True)
    monkeypatch.setattr(graphs, "_capture", noted)
    for name, stand_in in {
        "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph, "current_stream": lambda device=None: work, "graph_pool_handle": object,
        "stream": lambda stream: nullcontext(), "device": lambda device: nullcontext(), "is_current_stream_capturing": lambda: False,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    for make in (torch.empty, torch.empty_like):
        monkeypatch.setattr(torch, make.__name__, lambda *args, make=make, pin_memory=False, **options: make(*args, **options))
    transfer._stream.cache_clear()
    yield captured
    transfer._stream.cache_clear()
