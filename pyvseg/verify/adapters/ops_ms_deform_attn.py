# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention alone: forward and all gradients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pyvseg.ops import ms_deform_attn

LEAVES = ("value", "sampling_locations", "attention_weights")


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    for tag, config in manifest["config"]["cases"].items():
        leaves = [torch.from_numpy(inputs[f"in/{tag}.{name}"]).float().requires_grad_() for name in LEAVES]
        out = ms_deform_attn(leaves[0], config["shapes"], *leaves[1:])
        out.backward(torch.from_numpy(inputs[f"in/{tag}.grad_output"]).float())
        yield f"out/{tag}.output", out.detach().numpy()
        for name, leaf in zip(LEAVES, leaves, strict=True):
            if tag != "exact" or name != "sampling_locations":  # it jumps on pixel centres, the case stores none
                yield f"out/{tag}.grad_{name}", leaf.grad.numpy()
