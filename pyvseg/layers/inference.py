# SPDX-License-Identifier: Apache-2.0
"""Turning a trained network into the form that runs fastest: batch norms folded, channels last, our kernels and packed weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from pyvseg.layers.conv import fast_conv
from pyvseg.layers.packed import Linear


def fold_batch_norms(root: nn.Module) -> None:
    """Fold every batch norm of `root`, in evaluation mode, into the convolution or linear layer before it, in place.

    A pair is recognised by name (`conv1`/`bn1`, `conv`/`bn`, ...) or by being neighbours in a `Sequential`; norms of other names stay.
    """
    for module in root.modules():
        children = dict(module.named_children())
        names = list(children)
        for i, name in enumerate(names):
            norm = children[name]
            if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or (name.isidentifier() and not name.startswith("bn")):
                continue
            before = names[i - 1] if isinstance(module, nn.Sequential) else name.replace("bn", "conv")
            conv = children[before]
            fuse = fuse_linear_bn_weights if isinstance(conv, nn.Linear) else fuse_conv_bn_weights
            conv.weight, conv.bias = fuse(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            setattr(module, name, nn.Identity())


@torch.no_grad()
def for_inference(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model` in evaluation mode, folded, in `dtype` and channels last; changed in place and returned.

    Convolutions without groups become `layers.conv.fast_conv` modules and linear layers `layers.packed.Linear`: same result,
    inference only. A block that has a faster form of itself gives it by a method `for_inference`.
    """
    model.eval().requires_grad_(False)
    fold_batch_norms(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if hasattr(child, "for_inference"):
                setattr(module, name, child.for_inference())
            elif type(child) is nn.Linear:
                setattr(module, name, Linear(child))
            elif type(child) is nn.Conv2d and child.groups == 1:
                setattr(module, name, fast_conv(child))
    return model.to(dtype=dtype, memory_format=torch.channels_last)
