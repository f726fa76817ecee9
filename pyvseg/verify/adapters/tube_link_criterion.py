# SPDX-License-Identifier: Apache-2.0
"""The criterion of Tube-Link on stored predictions, targets and random numbers; with it the losses of its tracking head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyvseg.training.quasi_dense import quasi_dense_losses
from pyvseg.training.set_criterion import Target
from pyvseg.training.tube_link import TRACK, TRACK_COSINE, TubeCriterion


class Given(NamedTuple):
    logits: Tensor
    masks: Tensor


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    config, given = manifest["config"], {key.removeprefix("in/"): torch.from_numpy(x) for key, x in inputs.items()}
    weight = config["loss_weights"]
    criterion = TubeCriterion(
        config["things"] + config["stuff"], config["num_points"], config["oversample_ratio"], config["importance_sample_ratio"],
        config["class_weight"][-1], weight["cls"], weight["mask"], weight["dice"], config["things"],
    )  # fmt: skip
    logits, masks = given["cls"].requires_grad_(), given["masks"].requires_grad_()
    rest = iter([given[key] for key in sorted(key for key in given if key.startswith("rand"))])
    predictions = [Given(*pair) for pair in zip(logits, masks.transpose(2, 3))]
    losses = criterion(predictions, [Target(given["gt_labels"], given["gt_masks"].float())], random=lambda shape: next(rest))
    total = criterion.total(losses)
    total.backward()
    yield from ((f"out/{name}", criterion.weight(name) * loss.detach().reshape(1).numpy()) for name, loss in losses.items())
    yield "out/total", total.detach().reshape(1).numpy()
    yield "out/grad_cls", logits.grad.numpy()
    yield "out/grad_masks", masks.grad.numpy()
    yield from _tracking(given)


def _tracking(given: dict[str, Tensor]) -> Iterator[tuple]:
    key, reference = given["key_embed"].requires_grad_(), given["ref_embed"].requires_grad_()
    same = given["gt_match"][given["key_gt"]][:, None] == given["ref_gt"]
    contrastive, cosine = quasi_dense_losses(key, reference, same)
    (TRACK * contrastive + TRACK_COSINE * cosine).backward()
    yield "out/loss_track", TRACK * contrastive.detach().reshape(1).numpy()
    yield "out/loss_track_aux", TRACK_COSINE * cosine.detach().reshape(1).numpy()
    yield "out/grad_key_embed", key.grad.numpy()
    yield "out/grad_ref_embed", reference.grad.numpy()
