# SPDX-License-Identifier: Apache-2.0
"""The masked kernel update alone, and the whole update head with kernel linking: forward and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from pyvseg.checkpoints import key_maps, map_keys
from pyvseg.layers.kernel_head import KernelHead
from pyvseg.ops import KernelUpdator, mask_pool

HEAD_MATRICES = ("fc_mask.weight", "feat_transform.weight", "update.dynamic_layer.weight")


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    for tag, config in manifest["config"].items():
        case = {name.removeprefix(f"in/{tag}/"): torch.from_numpy(x) for name, x in inputs.items() if name.startswith(f"in/{tag}/")}
        for name in ("feats", "kernels", "previous_kernels"):
            if name in case:
                case[name].requires_grad_()
        for name, result in (_head if "heads" in config else _updator)(tag, config, weights, case):
            yield f"out/{tag}/{name}", result.detach().numpy()


def _updator(tag: str, config: dict, weights: dict[str, np.ndarray], case: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    updator = _loaded(KernelUpdator(config["C"]), f"updator_{tag}.", weights)
    pooled = mask_pool(case["mask_logits"], case["feats"])
    updated = updator(pooled, case["kernels"])
    updated.backward(case["grad_out"])
    yield "pooled", pooled
    yield "updated", updated
    yield from _gradients(case, updator, lambda name: config["C"] <= 64 or name == "input_gate.weight")


def _head(tag: str, config: dict, weights: dict[str, np.ndarray], case: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    head = KernelHead(config["C"], config["heads"], config["ffn"], config["classes"], link="attention")
    head = _loaded(head, f"head_{tag}.", weights)
    results = head(case["feats"], case["kernels"], case["mask_logits"], case["previous_kernels"])
    torch.autograd.backward(results, [case[f"grad_{name}"] for name in ("cls", "mask", "kernels", "linked")])
    yield "pooled", mask_pool(case["mask_logits"], head.feat_transform(case["feats"]))
    yield from zip(("cls_logits", "mask_logits", "kernels", "linked_kernels"), results)
    published = (key.removeprefix(f"head_{tag}.") for key in weights if key.startswith(f"head_{tag}."))
    names = {ours: theirs for theirs in published for ours in map_keys({theirs: None}, key_maps.KERNEL_HEAD)}
    yield from _gradients(case, head, lambda name: name in HEAD_MATRICES, names)


def _loaded(module: nn.Module, prefix: str, weights: dict[str, np.ndarray]) -> nn.Module:
    published = {key.removeprefix(prefix): torch.from_numpy(x) for key, x in weights.items() if key.startswith(prefix)}
    module.load_state_dict(map_keys(published, _names(module)))
    return module.eval()


def _names(module: nn.Module) -> list[tuple[str, str]]:
    return key_maps.KERNEL_HEAD if isinstance(module, KernelHead) else []


def _gradients(
    case: dict[str, Tensor], module: nn.Module, stored: Callable[[str], bool], published: dict[str, str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Of the inputs, of every vector among the parameters, and of the matrices that the case stores, by their published names."""
    for name in ("feats", "kernels", "previous_kernels"):
        if name in case:
            yield f"grad_{name}", case[name].grad
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 or stored(name):
            yield f"grad_param/{published[name] if published else name}", parameter.grad
