# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: what a network launches for inputs of one shape, as a single launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

KEPT = 8  # shapes of a module's methods, each with memory of its own on the GPU

_graphs: WeakKeyDictionary[nn.Module, dict[tuple, Any]] = WeakKeyDictionary()


def graphed(method: Callable, *tensors: Tensor) -> Any:
    """method(*tensors) of a module; on a GPU as a CUDA graph from the second call of a shape on.

    The method must do the same for all inputs of a shape: nothing that makes the host wait, no random numbers, no state. Where
    a graph cannot be had it is called as it is, which is slower. Inference only.
    """
    if not _applies(tensors):
        return method(*tensors)
    module = method.__self__
    graphs = _graphs.setdefault(module, {})
    weights = next(module.parameters()).data_ptr()  # a graph reads the memory where they were
    key = (method.__name__, weights, *((x.shape, x.stride(), x.dtype, x.device) for x in tensors))
    if key not in graphs:  # the first call builds kernels and chooses algorithms
        while len(graphs) >= KEPT:
            del graphs[next(iter(graphs))]
        graphs[key] = "seen"
        return method(*tensors)
    if graphs[key] == "seen":
        graphs[key] = _captured(method, tensors) or "failed"
    return method(*tensors) if graphs[key] == "failed" else graphs[key](*tensors)


def _applies(tensors: tuple[Tensor, ...]) -> bool:
    if not tensors[0].is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _captured(method: Callable, tensors: tuple[Tensor, ...]) -> Callable | None:
    """It knows nothing of the module, which goes with its last user, and its graphs with it."""
    inputs = [x.clone() for x in tensors]
    try:
        replay, outputs = _capture(method, inputs)
    except RuntimeError as error:
        name = f"{type(method.__self__).__name__}.{method.__name__}"
        warnings.warn(f"{name} runs without a CUDA graph: {str(error).splitlines()[0]}", stacklevel=3)
        return None

    def replayed(*given: Tensor) -> Any:
        for x, new in zip(inputs, given):
            x.copy_(new)
        replay()
        return tree_map_only(Tensor, torch.clone, outputs)  # the next replay writes over them

    return replayed


def _capture(method: Callable, inputs: list[Tensor]) -> tuple[Callable[[], None], Any]:
    work, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(work)
    with torch.cuda.stream(side):
        method(*inputs)  # on a stream of its own, as PyTorch asks for
    work.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # decoders and writers go on in their threads
        outputs = method(*inputs)
    return graph.replay, outputs
