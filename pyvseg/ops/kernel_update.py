# SPDX-License-Identifier: Apache-2.0
"""Masked kernel update of K-Net and its successors: features pooled inside each kernel's mask update the kernel.

The gated update is that of "K-Net: Towards Unified Image Segmentation" (NeurIPS 2021); Video K-Net, PolyphonicFormer and
Tube-Link share it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.ops import _dispatch

__all__ = ["KernelUpdator", "kernel_update", "mask_pool"]

_SLOWER = "4 to 10 times"
_LINEARS = ("dynamic_layer", "input_layer", "input_gate", "update_gate", "fc_layer")
_NORMS = ("norm_in", "norm_out", "input_norm_in", "input_norm_out", "fc_norm")


def mask_pool(
    masks: Tensor,  # (B, N, *S) logits; probabilities if `soft`
    features: Tensor,  # (B, C, *S)
    *,
    soft: bool = False,
    backend: str = "auto",
) -> Tensor:  # (B, N, C) float32
    """Sums, not means, of the features inside each of N masks, which are on where the logit is above zero.

    The published form is sigmoid(logit) > 0.5, which is the same but for rounding: in float32 the sigmoid of logits up to
    1.5 * 2^-24 rounds to 0.5, in bfloat16 of those up to about 2^-7, and such pixels count as off there; here they are on.
    A NaN logit is off. A pixel adds to the masks that it is in and to no other, so that a NaN stays where it is; the
    reference, a matrix product with zeros, spreads it.

    float32, bfloat16 or float16, masks and features each their own; sums are float32 (in half precision they would
    overflow), float64 for float64. Any strides; nothing is copied when masks are contiguous and features channels first or
    channels last. The gradient of the features is theirs in dtype and layout; hard masks get none. Results do not depend
    on the number of threads.

    `soft=True` weights each pixel with its value in `masks` instead: a plain matrix product, differentiable in both.

    Raises ValueError for shapes and devices, TypeError for dtypes, naming the argument.
    """
    choice = _plan_pool(masks, features, soft, backend)
    if masks.ndim > 3:
        masks, features = masks.flatten(2), features.flatten(2)
    if soft:
        wide = torch.promote_types(torch.promote_types(masks.dtype, features.dtype), torch.float32)
        return masks.to(wide) @ features.to(wide).mT
    if choice == "reference":
        return reference_pool(masks, features)
    return _dispatch.call(choice, "mask_pool", masks.detach(), features)


def reference_pool(masks: Tensor, features: Tensor) -> Tensor:
    """(B, N, M), (B, C, M) -> (B, N, C): the definition in PyTorch."""
    wide = torch.promote_types(features.dtype, torch.float32)
    return torch.einsum("bnm,bcm->bnc", (masks > 0).to(wide), features.to(wide))


class KernelUpdator(nn.Module):
    """The gated update of K-Net, with the parameter names of its published checkpoints (`kernel_update_conv.*`).

    p_in, p_out = dynamic_layer(pooled); k_in, k_out = input_layer(kernels), halves each; g = k_in * p_in
    K = sigmoid(norm_in(update_gate(g))) * norm_out(p_out) + sigmoid(input_norm_in(input_gate(g))) * input_norm_out(k_out)
    updated = relu(fc_norm(fc_layer(K)))
    """

    def __init__(self, channels: int = 256) -> None:
        super().__init__()
        self.dynamic_layer = nn.Linear(channels, 2 * channels)
        self.input_layer = nn.Linear(channels, 2 * channels)
        self.input_gate = nn.Linear(channels, channels)
        self.update_gate = nn.Linear(channels, channels)
        self.norm_in = nn.LayerNorm(channels)
        self.norm_out = nn.LayerNorm(channels)
        self.input_norm_in = nn.LayerNorm(channels)
        self.input_norm_out = nn.LayerNorm(channels)
        self.fc_layer = nn.Linear(channels, channels)
        self.fc_norm = nn.LayerNorm(channels)
        for name in _LINEARS:
            nn.init.xavier_uniform_(getattr(self, name).weight)

    def forward(
        self,
        pooled: Tensor,  # (..., C) what `mask_pool` gives
        kernels: Tensor,  # (..., C)
        *,
        backend: str = "auto",
    ) -> Tensor:  # (..., C) in the kernels' dtype
        """Updates every kernel with the features pooled in its mask.

        float32, bfloat16 or float16; between the inputs and the result everything is float32. Raises ValueError for shapes
        and devices, TypeError for dtypes, naming the argument.
        """
        modules = [self._modules[name] for name in _LINEARS + _NORMS]  # as attributes they take longer than a small update
        parameters = [p for module in modules for p in (module._parameters["weight"], module._parameters["bias"])]
        choice, eps = _plan_update(pooled, kernels, parameters, backend), self._modules["norm_in"].eps
        if choice == "reference":
            return reference_update(pooled, kernels, parameters, eps)
        C = kernels.shape[-1]
        rows = pooled.reshape(-1, C).float(), kernels.reshape(-1, C)
        return _dispatch.call(choice, "kernel_update", *rows, parameters, eps)[0].view(kernels.shape)


def reference_update(pooled: Tensor, kernels: Tensor, parameters: list[Tensor], eps: float = 1e-5) -> Tensor:
    """The definition in PyTorch, in the dtype of the parameters."""
    dtype, C = parameters[0].dtype, kernels.shape[-1]
    pairs = dict(zip(_LINEARS + _NORMS, zip(parameters[::2], parameters[1::2])))

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, *pairs[name])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), *pairs[name], eps)

    pooled_in, pooled_out = linear("dynamic_layer", pooled.to(dtype)).chunk(2, -1)
    kernel_in, kernel_out = linear("input_layer", kernels.to(dtype)).chunk(2, -1)
    both = kernel_in * pooled_in
    input_gate = norm("input_norm_in", linear("input_gate", both)).sigmoid()
    update_gate = norm("norm_in", linear("update_gate", both)).sigmoid()
    mixed = update_gate * norm("norm_out", pooled_out) + input_gate * norm("input_norm_out", kernel_out)
    return norm("fc_norm", linear("fc_layer", mixed)).relu().to(kernels.dtype)


def kernel_update(
    masks: Tensor,  # (B, N, *S) logits; probabilities if `soft`
    features: Tensor,  # (B, C, *S)
    kernels: Tensor,  # (B, N, C)
    updator: KernelUpdator,
    *,
    soft: bool = False,
    backend: str = "auto",
) -> Tensor:  # (B, N, C) in the kernels' dtype
    """Features pooled in each mask (`mask_pool`) update the mask's kernel (`KernelUpdator`). B is frames, clips or both.

    Raises ValueError for shapes and devices, TypeError for dtypes, naming the argument.
    """
    pooled = mask_pool(masks, features, soft=soft, backend=backend)
    return updator(pooled, kernels, backend=backend)


def _check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


@_dispatch.planned
def _plan_pool(masks: Tensor, features: Tensor, soft: bool, backend: str) -> str:
    for name, tensor in (("masks", masks), ("features", features)):
        _check_float(name, tensor)
        if tensor.ndim < 3:
            raise ValueError(f"{name} must have a batch, a channel and at least one space dimension, got shape {tuple(tensor.shape)}")
    if features.shape[0] != masks.shape[0] or features.shape[2:] != masks.shape[2:]:
        B, _, *size = masks.shape
        raise ValueError(f"features must be (B={B}, C, {', '.join(map(str, size))}) to go with masks, got {tuple(features.shape)}")
    if features.device != masks.device:
        raise ValueError(f"features is on {features.device} but masks on {masks.device}")
    return "reference" if soft else _dispatch.choose("kernel_update", backend, masks, features, slower=_SLOWER, few=1 << 11)


@_dispatch.planned
def _plan_update(pooled: Tensor, kernels: Tensor, parameters: list[Tensor], backend: str) -> str:
    C = parameters[-1].shape[0]
    for name, tensor in (("pooled", pooled), ("kernels", kernels)):
        _check_float(name, tensor)
        if tensor.ndim < 1 or tensor.shape[-1] != C:
            raise ValueError(f"{name} must be (..., C={C}), got shape {tuple(tensor.shape)}")
        if tensor.device != parameters[0].device:
            raise ValueError(f"{name} is on {tensor.device} but the updator on {parameters[0].device}")
    if pooled.shape != kernels.shape:
        raise ValueError(f"pooled must have the kernels' shape {tuple(kernels.shape)}, got {tuple(pooled.shape)}")
    return _dispatch.choose("kernel_update", backend, kernels, pooled, *parameters, slower=_SLOWER)


@_dispatch.register_fake("mask_pool")
def _fake_pool(masks: Tensor, features: Tensor) -> Tensor:
    return features.new_empty(*masks.shape[:2], features.shape[1], dtype=torch.float32)


@_dispatch.register_fake("mask_pool_backward")
def _fake_pool_backward(grad: Tensor, masks: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    B, _, M = masks.shape
    C = grad.shape[2]
    if channels_last:
        return grad.new_empty(B, M, C, dtype=dtype).mT
    return grad.new_empty(B, C, M, dtype=dtype)


def _save_pool(ctx, inputs, output) -> None:
    masks, features = inputs
    ctx.save_for_backward(masks)
    ctx.dtype, ctx.channels_last = features.dtype, features.shape[1] > 1 and features.stride(1) == 1


def _pool_backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
    (masks,) = ctx.saved_tensors
    return None, ctx.kernels.mask_pool_backward(grad.float(), masks, ctx.dtype, ctx.channels_last)


_dispatch.register_autograd("mask_pool", _pool_backward, setup_context=_save_pool)


@_dispatch.register_fake("kernel_update")
def _fake_update(pooled: Tensor, kernels: Tensor, parameters: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    R, C = kernels.shape
    return kernels.new_empty(R, C), kernels.new_empty(R, 7 * C, dtype=torch.float32)


@_dispatch.register_fake("kernel_update_backward")
def _fake_update_backward(
    grad: Tensor, pooled: Tensor, kernels: Tensor, parameters: list[Tensor], state: Tensor, eps: float, of_parameters: bool = True
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (pooled, kernels, *(parameters if of_parameters else ()))]


def _save_update(ctx, inputs, output) -> None:
    pooled, kernels, parameters, ctx.eps = inputs
    ctx.of_parameters = any(p.requires_grad for p in parameters)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(pooled, kernels, output[1], *parameters)


def _update_backward(ctx, grad: Tensor, _state) -> tuple:
    pooled, kernels, state, *parameters = ctx.saved_tensors
    grads = ctx.kernels.kernel_update_backward(grad, pooled, kernels, parameters, state, ctx.eps, ctx.of_parameters)
    return grads[0], grads[1], grads[2:] or [None] * len(parameters), None


_dispatch.register_autograd("kernel_update", _update_backward, setup_context=_save_update)
