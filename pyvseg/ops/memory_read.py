# SPDX-License-Identifier: Apache-2.0
"""Space-time memory read of STM-like video object segmentation, with the L2 similarity of STCN and PCVOS."""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyvseg.ops import _dispatch

__all__ = ["memory_read"]

_DTYPES = (torch.float32, torch.bfloat16)
_AFFINITY_FLOATS = 1 << 22  # of one chunk of queries in the PyTorch forms; bounds their memory


def memory_read(
    memory_key: Tensor,  # (B, N, CK)
    memory_value: Tensor,  # (B, O, N, CV)
    query_key: Tensor,  # (B, M, CK)
    top_k: int | None = 20,
    *,
    backend: str = "auto",
) -> Tensor:  # (B, O, M, CV)
    """Reads, for every query position, the values of the `top_k` most similar memory positions.

    S[n, m] = (2 <mk_n, qk_m> - |mk_n|^2) / sqrt(CK) is the negative squared distance of the keys up to a constant per
    query. Each query keeps its `top_k` largest S (among equals the earlier memory position), takes their softmax and
    sums the values with it. All O objects share the one affinity. `top_k=None` takes the softmax over the whole memory,
    the form that STCN trains with. Similarities and sums are float32; no N x M matrix is ever stored.

    float32 or bfloat16, keys of one dtype; the result has memory_value's dtype. Any strides; nothing is copied when the
    last dimension is contiguous. `top_k` is clamped to N; an empty memory reads zeros. The gradient is that of the kept
    positions; the selection carries none. It is deterministic.

    Raises ValueError for shapes, devices or `top_k`, TypeError for dtypes, naming the argument.
    """
    _check(memory_key, memory_value, query_key, top_k)
    B, O, N, CV = memory_value.shape
    M, CK = query_key.shape[1:]
    if 0 in (B, O, N, M, CV, CK):
        return _empty(memory_key, memory_value, query_key)
    if top_k is None:
        return _full_read(memory_key, memory_value, query_key)
    top_k = min(top_k, N)
    choice = _dispatch.choose("memory_read", backend, memory_key, memory_value, query_key, dtypes=_DTYPES, slower="20 to 50 times")
    if choice == "reference":
        return reference(memory_key, memory_value, query_key, top_k)
    return _dispatch.kernels(choice).memory_read(memory_key, memory_value, query_key, top_k)[0]


def similarity(memory_key: Tensor, query_key: Tensor) -> Tensor:
    """(B, N, CK), (B, M, CK) -> S transposed, (B, M, N), at least float32."""
    mk, qk = (key.to(torch.promote_types(key.dtype, torch.float32)) for key in (memory_key, query_key))
    return (2 * qk @ mk.mT - mk.square().sum(-1).unsqueeze(1)) / math.sqrt(mk.shape[-1])


def reference(memory_key: Tensor, memory_value: Tensor, query_key: Tensor, top_k: int) -> Tensor:
    """The definition in PyTorch, in chunks of queries."""
    N, CV = memory_value.shape[2:]
    chunk = max(1, _AFFINITY_FLOATS // max(N, top_k * CV))
    reads = []
    for query in query_key.split(chunk, dim=1):
        S = similarity(memory_key, query)
        index = _rank(S.detach()).topk(top_k).indices  # (B, m, k)
        weight = S.gather(-1, index).softmax(-1)
        values = torch.stack([value[:, i] for value, i in zip(memory_value, index)])  # (B, O, m, k, CV)
        reads.append(torch.einsum("bmk,bomkc->bomc", weight, values.to(weight.dtype)))
    return torch.cat(reads, dim=2).to(memory_value.dtype)


def _rank(S: Tensor) -> Tensor:
    """int64 in the order of (S, earlier position): a total order, NaN highest, so that every backend picks the same."""
    bits = (S.float() + 0.0).view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(S.isnan(), 0x7FFFFFFF)
    return (bits.long() << 32) - torch.arange(S.shape[-1], device=S.device)


def _full_read(memory_key: Tensor, memory_value: Tensor, query_key: Tensor) -> Tensor:
    """Softmax over the whole memory; chunks are recomputed in the backward so that no affinity is kept."""

    def read(query: Tensor) -> Tensor:
        weight = similarity(memory_key, query).softmax(-1).unsqueeze(1)
        return (weight @ memory_value.to(weight.dtype)).to(memory_value.dtype)

    chunks = query_key.split(max(1, _AFFINITY_FLOATS // memory_key.shape[1]), dim=1)
    if len(chunks) == 1:
        return read(query_key)
    return torch.cat([checkpoint(read, chunk, use_reentrant=False) for chunk in chunks], dim=2)


def _empty(memory_key: Tensor, memory_value: Tensor, query_key: Tensor) -> Tensor:
    B, O, _, CV = memory_value.shape
    zero = sum(t.flatten()[:0].sum() for t in (memory_key, memory_value, query_key))  # keeps the graph of the inputs
    return zero.to(memory_value.dtype).expand(B, O, query_key.shape[1], CV).clone()


def _check(memory_key: Tensor, memory_value: Tensor, query_key: Tensor, top_k: int | None) -> None:
    for name, tensor, dims in (("memory_key", memory_key, 3), ("memory_value", memory_value, 4), ("query_key", query_key, 3)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be float32 or bfloat16, got {tensor.dtype}")
        if tensor.ndim != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")
        if tensor.device != memory_key.device:
            raise ValueError(f"{name} is on {tensor.device} but memory_key on {memory_key.device}")
    if query_key.dtype != memory_key.dtype:
        raise TypeError(f"query_key must have memory_key's dtype {memory_key.dtype}, got {query_key.dtype}")
    B, N, CK = memory_key.shape
    if memory_value.shape[0] != B or memory_value.shape[2] != N:
        raise ValueError(f"memory_value must be (B={B}, O, N={N}, CV) to go with memory_key, got {tuple(memory_value.shape)}")
    if query_key.shape[0] != B or query_key.shape[2] != CK:
        raise ValueError(f"query_key must be (B={B}, M, CK={CK}) to go with memory_key, got {tuple(query_key.shape)}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, (int, torch.SymInt)) or top_k < 1):
        raise ValueError(f"top_k must be a positive integer or None, got {top_k!r}")


@_dispatch.register_fake("memory_read")
def _fake(memory_key: Tensor, memory_value: Tensor, query_key: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    B, O, _, CV = memory_value.shape
    M = query_key.shape[1]
    kept = (B, M, top_k)
    return (
        memory_value.new_empty(B, O, M, CV),
        memory_value.new_empty(kept, dtype=torch.int32),
        memory_value.new_empty(kept, dtype=torch.float32),
    )


@_dispatch.register_fake("memory_read_backward")
def _fake_backward(
    grad: Tensor, memory_key: Tensor, memory_value: Tensor, query_key: Tensor, index: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (memory_key, memory_value, query_key))


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _backward(ctx, grad, _index, _weight):
    return *ctx.kernels.memory_read_backward(grad, *ctx.saved_tensors), None


_dispatch.register_autograd("memory_read", _backward, setup_context=_save)
