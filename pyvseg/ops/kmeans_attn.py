# SPDX-License-Identifier: Apache-2.0
"""k-means cross-attention (Yu et al., kMaX-DeepLab, ECCV 2022; Shin et al., Video-kMaX, WACV 2024).

Each position joins the one cluster of its largest logit, and each cluster sums the values of its positions. Neither the
one-hot matrix of the published formulation nor, unless they are asked for, the logits are ever stored.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyvseg.ops import _dispatch

__all__ = ["KMeansAttn", "KMeansPool", "kmeans_assign", "kmeans_attn", "kmeans_pool"]

_SLOWER = "3 to 8 times"
_FEW = 32  # positions whose gradient PyTorch is quicker at


class KMeansAttn(NamedTuple):
    update: Tensor  # (B, N, D), float32 (float64 where value is)
    assign: Tensor  # (B * T, *S) int32, the cluster of every position
    count: Tensor  # (B, N) float32, positions of every cluster
    logits: Tensor | None  # (B * T, N, *S) in pixel's dtype, where wanted


class KMeansPool(NamedTuple):
    update: Tensor  # (B, N, D), float32 (float64 where value is)
    count: Tensor  # (B, N) float32


def kmeans_attn(
    pixel: Tensor,  # (B * T, C, *S)
    clusters: Tensor,  # (B, N, C)
    value: Tensor,  # (B * T, D, *S)
    *,
    scale: Tensor | float | None = None,  # one for all clusters or (N,)
    bias: Tensor | float | None = None,  # one for all clusters or (N,)
    reduction: str = "sum",  # or "mean"
    want_logits: bool = False,
    backend: str = "auto",
) -> KMeansAttn:
    """Assigns every position to the cluster of its largest logit, and sums the values of each cluster.

    logits = scale * <pixel, cluster> + bias, where scale and bias are a folded batch norm. Among equal logits the first
    cluster wins; NaN counts as larger than any number, as in `torch.argmax`. update[b, n] is the sum of the values of
    cluster n's positions; reduction="mean" divides it by their number, at least 1. The clusters of one clip serve all its
    T frames: T is how many times more maps pixel has than clusters, and the sums run over the T frames.

    float32, bfloat16 or float16, clusters in pixel's dtype; products and sums are float32. Any strides; channels first
    and channels last are read in place. Deterministic, on the CPU whatever the number of threads.

    The gradient reaches value through the sums, and pixel, clusters, scale and bias through the logits if those are
    wanted; the assignment has none.

    Raises ValueError for shapes, devices and reduction, TypeError for dtypes, naming the argument.
    """
    choice = _plan(pixel, clusters, value, scale, bias, reduction, backend)
    shape, B = pixel.shape[2:], clusters.shape[0]
    frames = pixel.shape[0] // B if B else 1
    centers = clusters if frames == 1 else clusters.repeat_interleave(frames, 0)
    scale, bias = _per_cluster(scale, clusters), _per_cluster(bias, clusters)
    run = reference if choice == "reference" else partial(_dispatch.call, choice, "kmeans_attn")
    update, assign, count, logits = run(_flat(pixel), centers, _flat(value), scale, bias, want_logits)
    update, count = _reduced(update, count, frames, reduction)
    if not want_logits:
        return KMeansAttn(update, _unflat(assign, shape), count, None)
    return KMeansAttn(update, _unflat(assign, shape), count, _unflat(logits, shape))


def _flat(maps: Tensor) -> Tensor:
    """(B, channels, *S) -> (B, channels, M)"""
    return maps if maps.ndim == 3 else maps.flatten(2)


def _unflat(maps: Tensor, shape: torch.Size) -> Tensor:
    """(..., M) -> (..., *S)"""
    return maps if len(shape) == 1 else maps.unflatten(-1, shape)


def kmeans_assign(
    logits: Tensor,  # (B, N, *S)
    *,
    backend: str = "auto",
) -> Tensor:  # (B, *S) int32
    """The cluster of every position's largest logit, the first among equals and NaN above all, as `torch.argmax`.

    Raises ValueError without clusters, TypeError for dtypes, naming the argument.
    """
    choice = _plan_assign(logits, backend)
    rows = _flat(logits.detach())
    assign = rows.argmax(1).int() if choice == "reference" else _dispatch.call(choice, "kmeans_assign", rows)
    return _unflat(assign, logits.shape[2:])


def kmeans_pool(
    value: Tensor,  # (B * frames, D, *S)
    assign: Tensor,  # (B * frames, *S) integers, the cluster of every position
    clusters: int,
    *,
    frames: int = 1,
    reduction: str = "sum",  # or "mean"
    backend: str = "auto",
) -> KMeansPool:
    """The sums of `kmeans_attn` where the assignment is known; `kmeans_assign` gives it for logits.

    Positions whose cluster is none of 0..clusters-1 are left out. Everything else is as for `kmeans_attn`.

    Raises ValueError for shapes, devices and reduction, TypeError for dtypes, naming the argument.
    """
    choice = _plan_pool(value, assign, clusters, frames, reduction, backend)
    if assign.dtype != torch.int32:
        assign = assign.clamp(-1, clusters).int()
    pool = reference_pool if choice == "reference" else partial(_dispatch.call, choice, "kmeans_pool")
    update, count = pool(assign.flatten(1), _flat(value), clusters)
    return KMeansPool(*_reduced(update, count, frames, reduction))


def reference(
    pixel: Tensor,  # (B, C, M)
    clusters: Tensor,  # (B, N, C)
    value: Tensor,  # (B, D, M)
    scale: Tensor | None,  # (N,) or (1,)
    bias: Tensor | None,  # (N,) or (1,)
    want_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition in PyTorch."""
    wide = torch.promote_types(pixel.dtype, torch.float32)
    logits = clusters.to(wide) @ pixel.to(wide)
    logits = logits if scale is None else scale[:, None] * logits
    logits = logits if bias is None else logits + bias[:, None]
    assign = logits.argmax(1)
    update, count = _sums(assign, value, clusters.shape[1])
    return update, assign.int(), count, logits.to(pixel.dtype)


def reference_pool(assign: Tensor, value: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """assign (B, M), value (B, D, M) -> sums (B, N, D), counts (B, N); a last row takes the positions of no cluster."""
    bins = torch.where((assign >= 0) & (assign < clusters), assign, clusters).long()
    update, count = _sums(bins, value, clusters + 1)
    return update[:, :-1], count[:, :-1]


def _sums(bins: Tensor, value: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    (B, D, _), wide = value.shape, torch.promote_types(value.dtype, torch.float32)
    update, count = value.new_zeros(B, clusters, D, dtype=wide), value.new_zeros(B, clusters, dtype=torch.float32)
    update.scatter_add_(1, bins.unsqueeze(-1).expand(-1, -1, D), value.mT.to(wide))
    return update, count.scatter_add_(1, bins, count.new_ones(()).expand(bins.shape))


def _reduced(update: Tensor, count: Tensor, frames: int, reduction: str) -> tuple[Tensor, Tensor]:
    if frames != 1:
        update, count = (x.unflatten(0, (-1, frames)).sum(1) for x in (update, count))
    return (update / count.clamp(min=1).unsqueeze(-1) if reduction == "mean" else update), count


def _per_cluster(x: Tensor | float | None, clusters: Tensor) -> Tensor | None:
    """(N,) or (1,) in float32, float64 where clusters are."""
    wide = torch.promote_types(clusters.dtype, torch.float32)
    if x is None or not isinstance(x, Tensor):
        return None if x is None else clusters.new_full((1,), float(x), dtype=wide)
    return x.reshape(-1).to(wide)


@_dispatch.planned
def _plan(
    pixel: Tensor, clusters: Tensor, value: Tensor, scale: Tensor | float | None, bias: Tensor | float | None, reduction: str, backend: str
) -> str:
    _check_maps(pixel, value)
    _check_clusters(pixel, clusters)
    _check_reduction(reduction)
    _check_per_cluster("scale", scale, clusters)
    _check_per_cluster("bias", bias, clusters)
    return _dispatch.choose("kmeans_attn", backend, pixel, value, slower=_SLOWER, few=_few(value), lost=_clusters_outweigh(pixel, clusters))


def _clusters_outweigh(pixel: Tensor, clusters: Tensor) -> bool:
    """The CPU kernel first turns the clusters round, which so few positions do not pay for."""
    if torch.compiler.is_compiling() or pixel.dtype != torch.float32:
        return False
    return pixel.shape[2:].numel() <= clusters.shape[1:].numel() >> 13


@_dispatch.planned
def _plan_assign(logits: Tensor, backend: str) -> str:
    _check_float("logits", logits)
    if logits.ndim < 3 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (B, N, *S) with at least one cluster, got shape {tuple(logits.shape)}")
    return _dispatch.choose("kmeans_attn", backend, logits, slower=_SLOWER)


@_dispatch.planned
def _plan_pool(value: Tensor, assign: Tensor, clusters: int, frames: int, reduction: str, backend: str) -> str:
    _check_float("value", value)
    _check_reduction(reduction)
    if not isinstance(assign, Tensor) or assign.is_floating_point() or assign.is_complex() or assign.dtype == torch.bool:
        raise TypeError(f"assign must be a tensor of integers, got {getattr(assign, 'dtype', type(assign).__name__)}")
    if value.ndim < 3 or assign.shape != (value.shape[0], *value.shape[2:]):
        raise ValueError(f"assign must be (B, *S) to go with value {tuple(value.shape)}, got shape {tuple(assign.shape)}")
    if assign.device != value.device:
        raise ValueError(f"assign is on {assign.device} but value on {value.device}")
    if clusters < 0 or clusters >= 2**31 - 1:
        raise ValueError(f"clusters must be in 0..2^31-2, got {clusters}")
    if frames < 1 or value.shape[0] % frames:
        raise ValueError(f"frames must divide value's {value.shape[0]} maps, got {frames}")
    return _dispatch.choose("kmeans_attn", backend, value, slower=_SLOWER, few=_few(value))


def _few(value: Tensor) -> float:
    return math.inf if value.shape[0] * value.shape[2:].numel() <= _FEW else 0


def _check_per_cluster(name: str, x: Tensor | float | None, clusters: Tensor) -> None:
    if not isinstance(x, Tensor):
        return
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.numel() not in (1, clusters.shape[1]) or x.ndim > 1:
        raise ValueError(f"{name} must have 1 or N={clusters.shape[1]} elements, got shape {tuple(x.shape)}")
    if x.device != clusters.device:
        raise ValueError(f"{name} is on {x.device} but clusters on {clusters.device}")


def _check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def _check_maps(pixel: Tensor, value: Tensor) -> None:
    for name, tensor in (("pixel", pixel), ("value", value)):
        _check_float(name, tensor)
        if tensor.ndim < 3:
            raise ValueError(f"{name} must be (B, channels, *S), got shape {tuple(tensor.shape)}")
    if value.shape[0] != pixel.shape[0] or value.shape[2:] != pixel.shape[2:]:
        raise ValueError(f"value must be (B, D, *S) with pixel's B and S {tuple(pixel.shape)}, got {tuple(value.shape)}")
    if value.device != pixel.device:
        raise ValueError(f"value is on {value.device} but pixel on {pixel.device}")


def _check_clusters(pixel: Tensor, clusters: Tensor) -> None:
    _check_float("clusters", clusters)
    if clusters.dtype != pixel.dtype:
        raise TypeError(f"clusters must have pixel's dtype {pixel.dtype}, got {clusters.dtype}")
    if clusters.ndim != 3 or clusters.shape[2] != pixel.shape[1] or clusters.shape[1] == 0:
        raise ValueError(f"clusters must be (B, N, C={pixel.shape[1]}) with N > 0, got shape {tuple(clusters.shape)}")
    B, maps = clusters.shape[0], pixel.shape[0]
    if maps % B if B else maps:
        raise ValueError(f"pixel must have as many maps as clusters, {B}, or a multiple, got {maps}")
    if clusters.device != pixel.device:
        raise ValueError(f"clusters is on {clusters.device} but pixel on {pixel.device}")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}')


@_dispatch.register_fake("kmeans_attn")
def _fake(
    pixel: Tensor, clusters: Tensor, value: Tensor, scale: Tensor | None, bias: Tensor | None, want_logits: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, _, M = pixel.shape
    N, D = clusters.shape[1], value.shape[1]
    return (
        value.new_empty(B, N, D, dtype=torch.float32),
        pixel.new_empty(B, M, dtype=torch.int32),
        value.new_empty(B, N, dtype=torch.float32),
        pixel.new_empty((B, N, M) if want_logits else (0,)),
    )


@_dispatch.register_fake("kmeans_assign")
def _fake_assign(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], logits.shape[2], dtype=torch.int32)


@_dispatch.register_fake("kmeans_pool")
def _fake_pool(assign: Tensor, value: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    B, D, _ = value.shape
    return value.new_empty(B, clusters, D, dtype=torch.float32), value.new_empty(B, clusters, dtype=torch.float32)


@_dispatch.register_fake("kmeans_gather")
def _fake_gather(grad_update: Tensor, assign: Tensor) -> Tensor:
    return grad_update.new_empty(grad_update.shape[0], grad_update.shape[2], assign.shape[1])


def _save(ctx, inputs, output) -> None:
    pixel, clusters, value, scale, bias, want_logits = inputs
    _, assign, count, logits = output
    through_logits = want_logits and any(t is not None and t.requires_grad for t in (pixel, clusters, scale, bias))
    ctx.mark_non_differentiable(assign, count, *(() if through_logits else (logits,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(assign, *((pixel, clusters, scale) if through_logits else ()))
    ctx.value_dtype, ctx.bias_size = value.dtype, None if bias is None else bias.shape[0]


def _backward(ctx, grad_update, _assign, _count, grad_logits):
    assign, *of_logits = ctx.saved_tensors
    grad_value = None if grad_update is None else ctx.kernels.kmeans_gather(grad_update.to(ctx.value_dtype), assign)
    if grad_logits is None:
        return None, None, grad_value, None, None, None
    grad_pixel, grad_clusters, grad_scale, grad_bias = _logits_backward(grad_logits, *of_logits, ctx.bias_size)
    return grad_pixel, grad_clusters, grad_value, grad_scale, grad_bias, None


def _logits_backward(grad: Tensor, pixel: Tensor, clusters: Tensor, scale: Tensor | None, bias_size: int | None) -> tuple[Tensor | None, ...]:
    """Gradients of pixel, clusters, scale and bias, of which one for all clusters takes the sum of theirs."""
    grad, wide_pixel, wide_clusters = (t.float() for t in (grad, pixel, clusters))
    products = grad @ wide_pixel.mT  # (B, N, C)
    slope = 1 if scale is None else scale[:, None]
    grad_pixel = (slope * wide_clusters).mT @ grad
    grad_scale, grad_bias = (products * wide_clusters).sum((0, 2)), grad.sum((0, 2))
    fit = lambda total, size: None if size is None else total if size > 1 else total.sum(0, keepdim=True)  # noqa: E731
    return (
        grad_pixel.to(pixel.dtype),
        (slope * products).to(clusters.dtype),
        fit(grad_scale, None if scale is None else scale.shape[0]),
        fit(grad_bias, bias_size),
    )


def _save_pool(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0])
    ctx.value_dtype = inputs[1].dtype


def _pool_backward(ctx, grad_update, _count):
    return None, ctx.kernels.kmeans_gather(grad_update.to(ctx.value_dtype), *ctx.saved_tensors), None


_dispatch.register_autograd("kmeans_attn", _backward, setup_context=_save)
_dispatch.register_autograd("kmeans_pool", _pool_backward, setup_context=_save_pool)
