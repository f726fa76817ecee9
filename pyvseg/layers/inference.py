# SPDX-License-Identifier: Apache-2.0
"""Turning a trained network into the form that runs fastest: batch norms folded, channels last, 3x3 convolutions on our kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from pyvseg.layers.conv import fast_conv3x3


class Linear(nn.Module):
    """`nn.Linear` for inference. In float32 on a CPU it runs as a 1x1 convolution: oneDNN's kernels behind that are about
    twice as fast as the matrix library behind `F.linear` on current AMD processors, and no slower elsewhere."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(1, 1, -1, self.in_features).permute(0, 3, 1, 2)
        y = F.conv2d(rows, self.weight[:, :, None, None], self.bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


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

    Dense 3x3 convolutions of stride 1 become `layers.conv.fast_conv3x3` modules: same result, inference only.
    """
    model.eval().requires_grad_(False)
    fold_batch_norms(model)
    model.to(dtype=dtype, memory_format=torch.channels_last)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if hasattr(child, "for_inference"):
                setattr(module, name, child.for_inference())
            elif type(child) is nn.Linear:
                setattr(module, name, Linear(child))
            elif type(child) is nn.Conv2d and child.kernel_size == (3, 3) and child.stride == (1, 1) and child.groups == 1:
                setattr(module, name, fast_conv3x3(child))
    return model
