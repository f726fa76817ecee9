# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: what a network launches for inputs of one shape, as a single launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pyvseg.layers.transfer import holding, on_gpu

KEPT = 8  # graphs of a module on a stream
_SEEN = 64  # shapes that came once

_capturing = Lock()  # PyTorch captures one graph at a time
_graphs: WeakKeyDictionary[nn.Module, dict[int, _Graphs]] = WeakKeyDictionary()


def graphed(method: Callable, *tensors: Tensor) -> Any:
    """method(*tensors) of a module; on a GPU as a CUDA graph from the second call of a shape on.

    The method must do the same for all inputs of a shape: nothing that makes the host wait, no random numbers, no state. Where
    a graph cannot be had it is called as it is, which is slower. Inference only; weights may change in place or by `to`.
    """
    if not _applies(tensors):
        return method(*tensors)
    module, device = method.__self__, tensors[0].device
    of_module = _graphs.setdefault(module, {})
    stream = torch.cuda.current_stream(device).cuda_stream
    weights = next(module.parameters()).data_ptr()  # a graph reads the memory where they were
    if stream not in of_module or of_module[stream].weights[0].data_ptr() != weights:
        of_module[stream] = _Graphs(module)
    return of_module[stream].run(method, tensors)


def _applies(tensors: tuple[Tensor, ...]) -> bool:
    if not on_gpu(tensors[0].device) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


class _Graphs:
    """Those of a module on one stream. They run one after the other and share what memory they need inside.

    It knows nothing of the module, which goes with its last user, and its graphs with it. Nobody else gets the memory of its
    weights meanwhile: where the first of them lies tells whether they are still the same.
    """

    def __init__(self, module: nn.Module) -> None:
        self.weights = [x.detach() for x in (*module.parameters(), *module.buffers())]
        self.found: dict[tuple, Callable | None] = {}  # None: it cannot be had; the last used one at the end
        self.seen: dict[tuple, None] = {}
        self.memory: _Memory | None = None
        self.lock = Lock()  # a thread's inputs must not meet another one's

    def run(self, method: Callable, tensors: tuple[Tensor, ...]) -> Any:
        key = (method.__name__, *((x.shape, x.stride(), x.dtype, x.device) for x in tensors))
        with self.lock:
            if key not in self.found and key in self.seen:
                self.found[key] = self._captured(method, tensors)
                while len(self.found) > KEPT:
                    del self.found[next(iter(self.found))]
            if key in self.found:
                self.found[key] = replayed = self.found.pop(key)
                return _copied(method(*tensors)) if replayed is None else replayed(*tensors)
        while len(self.seen) >= _SEEN:
            del self.seen[next(iter(self.seen))]
        self.seen[key] = None
        return _copied(method(*tensors))  # the first call builds kernels and chooses algorithms

    def _captured(self, method: Callable, tensors: tuple[Tensor, ...]) -> Callable | None:
        with torch.inference_mode(False), torch.no_grad():  # else only inference mode could write to them
            inputs = [x.clone() for x in tensors]
        self.memory = self.memory or _Memory(inputs[0].device)
        try:
            with _capturing, holding() as constants:
                replay, outputs = _capture(method, inputs, self.memory)
        except RuntimeError as error:
            name = f"{type(method.__self__).__name__}.{method.__name__}"
            warnings.warn(f"{name} runs without a CUDA graph: {str(error).splitlines()[0]}", stacklevel=5)
            return None

        def replayed(*given: Tensor, _read=constants) -> Any:
            for x, new in zip(inputs, given):
                x.copy_(new)
            replay()
            return _copied(outputs)  # the next replay writes over them

        return replayed


def _copied(outputs: Any) -> Any:
    """Also where no graph ran, so that what follows finds its inputs laid out alike: products round by their layout."""
    return tree_map_only(Tensor, torch.clone, outputs)


class _Memory:
    """What graphs that never run at the same time share: a stream to capture on, and its memory."""

    def __init__(self, device: torch.device) -> None:
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


def _capture(method: Callable, inputs: list[Tensor], memory: _Memory) -> tuple[Callable[[], None], Any]:
    with torch.cuda.device(inputs[0].device):
        work, side = torch.cuda.current_stream(), memory.stream
        side.wait_stream(work)
        with torch.cuda.stream(side):
            method(*inputs)  # once on that stream, as PyTorch asks for
        work.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        how = {"pool": memory.pool, "stream": side, "capture_error_mode": "thread_local"}  # decoders and writers go on in their threads
        with torch.cuda.stream(work), torch.cuda.graph(graph, **how):  # the outer one comes back from a capture that failed
            outputs = method(*inputs)
    return graph.replay, outputs
