# SPDX-License-Identifier: Apache-2.0
"""The k-means step alone: logits, assignment, sums, and the gradient of the values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pyvseg.ops import kmeans_assign, kmeans_attn, kmeans_pool


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    for config in manifest["config"]["cases"]:
        name, reduction = config["name"], config["reduction"].split()[0]
        given = {key.split(".")[1]: torch.from_numpy(x) for key, x in inputs.items() if key.startswith(f"in/{name}.")}
        yield from ((f"{kind}/{name}.{part}", result) for kind, part, result in _case(config, reduction, given))


def _case(config: dict, reduction: str, given: dict[str, torch.Tensor]) -> Iterator[tuple[str, str, np.ndarray]]:
    value = given["value"].clone().requires_grad_()
    if "logits" in given:
        assign = kmeans_assign(given["logits"])
        update, _ = kmeans_pool(value, assign, config["N"], frames=config["T"], reduction=reduction)
    else:
        step = kmeans_attn(given["pixel"], given["kernel"].mT, value, scale=config["scale"], bias=config["bias"], reduction=reduction, want_logits=True)
        update, assign = step.update, step.assign
        yield "tap", "logits", step.logits.numpy()
    update.mT.backward(given["grad_update"])
    yield "out", "update", update.detach().mT.numpy()
    yield "out", "assign", assign.numpy()
    yield "out", "grad_value", value.grad.numpy()
