# SPDX-License-Identifier: Apache-2.0
"""Space-time memory read of STM-like video object segmentation, with the L2 similarity of STCN and PCVOS."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyvseg.ops import _dispatch

__all__ = ["memory_read"]

_AFFINITY_FLOATS = 1 << 22  # of one chunk of queries in the PyTorch forms; bounds their memory


def memory_read(
    memory_key: Tensor,  # (B, N, CK)
    memory_value: Tensor,  # (B, O, N, CV)
    query_key: Tensor,  # (B, M, CK); M may span several frames
    top_k: int | None = 20,
    *,
    shrinkage: Tensor | None = None,  # (B, N)
    selection: Tensor | None = None,  # (B, M, CK)
    return_usage: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # (B, O, M, CV), usage (B, N)
    """Reads, for every query position, the values of the `top_k` most similar memory positions.

    S[n, m] = (2 <mk_n, qk_m> - |mk_n|^2) / sqrt(CK) is the negative squared distance of the keys up to a constant per
    query (STCN, Cheng et al., 2021; PCVOS, Park et al., 2022). Each query keeps its `top_k` largest S (among equals the
    earlier memory position), takes their softmax and sums the values with it. All O objects share the one affinity.
    `top_k=None` takes the softmax over the whole memory, the form that STCN trains with. Similarities and sums are
    float32; no N x M matrix is ever stored, so that the queries of many frames go into one call.

    With `shrinkage` s and `selection` e (XMem, Cheng and Schwing, 2022; one of them left out counts as ones)
    S[n, m] = -s_n sum_c e_mc (mk_nc - qk_mc)^2 / sqrt(CK). `return_usage` adds the affinity summed over the queries,
    float32, by which such systems decide what to forget; it carries no gradient.

    float32, bfloat16 or float16, keys of one dtype; the result has memory_value's dtype. Any strides; nothing is copied
    when the last dimension is contiguous. `top_k` of N or more is the whole memory; an empty memory reads zeros. The
    gradient is that of the kept positions; the selection carries none. It is deterministic.

    Raises ValueError for shapes, devices or `top_k`, TypeError for dtypes, naming the argument.
    """
    choice = _plan(memory_key, memory_value, query_key, top_k, shrinkage, selection, backend)
    N = memory_key.shape[1]
    if choice == "empty":
        read, usage = _empty(memory_value, memory_key, query_key, shrinkage, selection), memory_key.new_zeros(memory_key.shape[:2]).float()
    elif choice == "reference":
        kept = None if top_k is None or top_k >= N else top_k  # where nothing is left out, a dense product is quicker
        read, usage = reference(memory_key, memory_value, query_key, kept, shrinkage, selection)
    else:
        dot = shrinkage is not None or selection is not None
        keys = _expanded(memory_key, query_key, shrinkage, selection) if dot else (memory_key, query_key)
        read, index, weight = _dispatch.call(choice, "memory_read", keys[0], memory_value, keys[1], top_k, dot)
        usage = _usage(index, weight, N) if return_usage else None
    return (read, usage) if return_usage else read


def similarity(memory_key: Tensor, query_key: Tensor, shrinkage: Tensor | None = None, selection: Tensor | None = None) -> Tensor:
    """S transposed, (B, M, N), at least float32."""
    wide = torch.promote_types(memory_key.dtype, torch.float32)
    mk, qk, s, e = (None if t is None else t.to(wide) for t in (memory_key, query_key, shrinkage, selection))
    if e is None:
        S = 2 * qk @ mk.mT - mk.square().sum(-1).unsqueeze(1)
    else:
        S = 2 * (qk * e) @ mk.mT - e @ mk.square().mT
    if s is not None:
        S = (S - (qk.square() if e is None else e * qk.square()).sum(-1, keepdim=True)) * s.unsqueeze(1)
    return S / math.sqrt(mk.shape[-1])


def reference(
    memory_key: Tensor,
    memory_value: Tensor,
    query_key: Tensor,
    top_k: int | None,
    shrinkage: Tensor | None = None,
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition in PyTorch, in chunks of queries: readout and usage."""
    N, CV = memory_value.shape[2:]
    chunk = max(1, _AFFINITY_FLOATS // max(N, (top_k or 0) * CV))
    queries = query_key.split(chunk, dim=1)
    selections = len(queries) * [None] if selection is None else selection.split(chunk, dim=1)
    read = _full_read if top_k is None else _sparse_read
    if len(queries) > 1 and top_k is None:  # so that no affinity is kept for the backward
        read = partial(checkpoint, read, use_reentrant=False)
    reads = [read(memory_key, memory_value, q, top_k, shrinkage, e) for q, e in zip(queries, selections, strict=True)]
    return torch.cat([read for read, _ in reads], dim=2), sum(usage for _, usage in reads)


def _sparse_read(mk: Tensor, mv: Tensor, qk: Tensor, top_k: int, shrinkage: Tensor | None, selection: Tensor | None) -> tuple[Tensor, Tensor]:
    S = similarity(mk, qk, shrinkage, selection)
    index = _rank(S.detach()).topk(min(top_k, S.shape[-1])).indices  # (B, m, k)
    weight = S.gather(-1, index).softmax(-1)
    values = torch.stack([value[:, i] for value, i in zip(mv, index, strict=True)])  # (B, O, m, k, CV)
    read = torch.einsum("bmk,bomkc->bomc", weight, values.to(weight.dtype))
    return read.to(mv.dtype), _usage(index, weight, S.shape[-1])


def _full_read(mk: Tensor, mv: Tensor, qk: Tensor, _: None, shrinkage: Tensor | None, selection: Tensor | None) -> tuple[Tensor, Tensor]:
    weight = similarity(mk, qk, shrinkage, selection).softmax(-1)
    return (weight.unsqueeze(1) @ mv.to(weight.dtype)).to(mv.dtype), weight.detach().sum(1).float()


def _rank(S: Tensor) -> Tensor:
    """int64 in the order of (S, earlier position): a total order, NaN highest, so that every backend picks the same."""
    bits = (S.float() + 0.0).view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(S.isnan(), 0x7FFFFFFF)
    return (bits.long() << 32) - torch.arange(S.shape[-1], device=S.device)


def _usage(index: Tensor, weight: Tensor, N: int) -> Tensor:
    """(B, M, k), (B, M, k) -> (B, N), float32"""
    B = len(index)
    row = index.long() + N * torch.arange(B, device=index.device).view(B, 1, 1)
    return weight.new_zeros(B * N, dtype=torch.float32).index_add(0, row.flatten(), weight.detach().float().flatten()).view(B, N)


def _expanded(memory_key: Tensor, query_key: Tensor, shrinkage: Tensor | None, selection: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys whose dot product is S (without what is constant per query), float32, of a width that is a multiple of 8."""
    mk, qk = memory_key.float(), query_key.float()
    e = torch.ones_like(qk[..., :1]) if selection is None else selection.float()
    squares = mk.square().sum(-1, keepdim=True) if selection is None else mk.square()
    rows, columns = [mk, squares], [2 * e * qk, -e]
    if shrinkage is not None:
        rows.append(torch.ones_like(mk[..., :1]))
        columns.append(-(e * qk.square()).sum(-1, keepdim=True))
    for parts, key in ((rows, mk), (columns, qk)):
        parts.append(key.new_zeros(*key.shape[:2], -sum(part.shape[-1] for part in parts) % 8))
    keys, queries = torch.cat(rows, -1), torch.cat(columns, -1) / math.sqrt(mk.shape[-1])
    return (keys if shrinkage is None else keys * shrinkage.float().unsqueeze(-1)), queries


def _empty(memory_value: Tensor, memory_key: Tensor, query_key: Tensor, *others: Tensor | None) -> Tensor:
    B, O, _, CV = memory_value.shape
    inputs = (memory_value, memory_key, query_key, *(t for t in others if t is not None))
    zero = sum(t.flatten()[:0].sum() for t in inputs)  # keeps the graph of the inputs
    return zero.to(memory_value.dtype).expand(B, O, query_key.shape[1], CV).clone()


@_dispatch.planned
def _plan(
    memory_key: Tensor, memory_value: Tensor, query_key: Tensor, top_k: int | None, shrinkage: Tensor | None, selection: Tensor | None, backend: str
) -> str:
    tensors = {"memory_key": (memory_key, 3), "memory_value": (memory_value, 4), "query_key": (query_key, 3)}
    tensors |= {name: (t, d) for name, t, d in (("shrinkage", shrinkage, 2), ("selection", selection, 3)) if t is not None}
    for name, (tensor, dims) in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
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
    if shrinkage is not None and shrinkage.shape != (B, N):
        raise ValueError(f"shrinkage must be (B={B}, N={N}) to go with memory_key, got {tuple(shrinkage.shape)}")
    if selection is not None and selection.shape != query_key.shape:
        raise ValueError(f"selection must have query_key's shape {tuple(query_key.shape)}, got {tuple(selection.shape)}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, (int, torch.SymInt)) or top_k < 1):
        raise ValueError(f"top_k must be a positive integer or None, got {top_k!r}")
    if 0 in (*memory_value.shape, *query_key.shape):
        return "empty"
    choice = "reference" if top_k is None else _dispatch.choose("memory_read", backend, memory_key, memory_value, query_key, slower="20 to 50 times")
    return "reference" if top_k is None or top_k >= N else choice


@_dispatch.register_fake("memory_read")
def _fake(memory_key: Tensor, memory_value: Tensor, query_key: Tensor, top_k: int, dot: bool = False) -> tuple[Tensor, Tensor, Tensor]:
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
    grad: Tensor, memory_key: Tensor, memory_value: Tensor, query_key: Tensor, index: Tensor, weight: Tensor, dot: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (memory_key, memory_value, query_key))


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.dot = inputs[4]


def _backward(ctx, grad, _index, _weight):
    return *ctx.kernels.memory_read_backward(grad, *ctx.saved_tensors, ctx.dot), None, None


_dispatch.register_autograd("memory_read", _backward, setup_context=_save)
