# SPDX-License-Identifier: Apache-2.0
"""The memory read alone: top-k and full softmax, forward and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pyvseg.ops import memory_read
from pyvseg.ops.memory_read import similarity
from pyvseg.verify.compare import Rule

NEGLIGIBLE = 1e-7  # top-k weights below this need not stand in the stored order


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    for tag, config in manifest["config"].items():
        keys, values, queries, grad = (torch.from_numpy(inputs[f"in/{tag}/{part}"]).float() for part in ("mk", "mv", "qk", "grad_out"))
        # The case is channels first with objects as the batch; the op is channels last with objects inside it.
        keys, values, queries, grad = _rows(keys), _rows(values)[None], _rows(queries), _rows(grad)[None]
        yield from _affinity(tag, keys, queries, config["top_k"])
        yield from _readout(tag, ("readout", "topk_grad"), keys, values, queries, grad, config["top_k"], inputs)
        yield from _readout(tag, ("full_readout", "full_grad"), keys, values, queries, grad, None, inputs)
    yield from _anisotropic(inputs)


def _rows(x: Tensor) -> Tensor:
    """(B, C, *S) -> (B, prod(S), C)"""
    return x.flatten(2).transpose(1, 2).contiguous()


def _affinity(tag: str, keys: Tensor, queries: Tensor, top_k: int) -> Iterator[tuple]:
    """The weights themselves: what one reads from a memory whose values are the unit vectors."""
    units = torch.eye(keys.shape[1])[None, None]
    affinity = memory_read(keys, units, queries, top_k)[0, 0]  # (M, N)
    weight, index = affinity.sort(dim=1, descending=True, stable=True)
    weight, index = weight[:, :top_k].T.numpy(), index[:, :top_k].T.numpy()
    yield f"out/{tag}/topk_weight", weight
    yield f"out/{tag}/topk_index", index, Rule(where=weight >= NEGLIGIBLE)


def _anisotropic(inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    parts = {name: torch.from_numpy(inputs[f"in/aniso/{name}"]).float() for name in ("mk", "mv", "ms", "qk", "qe")}
    keys, values, shrinkage, queries, selection = (_rows(part) for part in parts.values())
    terms = {"shrinkage": shrinkage[..., 0], "selection": selection}
    yield "out/aniso/similarity", similarity(keys, queries, **terms).mT.numpy()
    readout, usage = memory_read(keys, values[None], queries, 30, **terms, return_usage=True)
    yield "out/aniso/readout", readout[0].mT.reshape(-1, values.shape[-1], *parts["qk"].shape[2:]).numpy()
    yield "out/aniso/usage", usage.numpy()


def _readout(tag: str, names: tuple[str, str], keys: Tensor, values: Tensor, queries: Tensor, grad: Tensor, top_k: int | None, inputs: dict) -> Iterator[tuple]:
    keys, values, queries = (x.clone().requires_grad_() for x in (keys, values, queries))
    readout = memory_read(keys, values, queries, top_k)
    readout.backward(grad)
    objects = values.shape[1]
    memory, query = inputs[f"in/{tag}/mk"].shape, inputs[f"in/{tag}/qk"].shape
    yield f"out/{tag}/{names[0]}", readout[0].detach().mT.reshape(objects, -1, *query[2:]).numpy()
    yield f"out/{tag}/{names[1]}_mk", keys.grad.mT.reshape(memory).numpy()
    yield f"out/{tag}/{names[1]}_qk", queries.grad.mT.reshape(query).numpy()
    yield f"out/{tag}/{names[1]}_mv_sum", values.grad[0].sum(-1).reshape(objects, *memory[2:]).numpy()
    yield f"out/{tag}/{names[1]}_mv_c0", values.grad[0, ..., 0].reshape(objects, *memory[2:]).numpy()
