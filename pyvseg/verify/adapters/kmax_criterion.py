# SPDX-License-Identifier: Apache-2.0
"""The criterion of kMaX-DeepLab and Video-kMaX on stored predictions, targets and random numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pyvseg.training.kmax import KMaXCriterion, Prediction, Target, sample

PARTS = ("pred_logits", "pred_masks", "pixel_feature")


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    for tag in ("video", "image"):
        given = {key.removeprefix(f"in/{tag}/"): torch.from_numpy(x) for key, x in inputs.items() if key.startswith(f"in/{tag}/")}
        yield from ((f"{kind}/{tag}/{name}", result) for kind, name, result in _criterion(manifest["config"], tag, given))


def _criterion(config: dict, tag: str, given: dict[str, Tensor]) -> Iterator[tuple]:
    sizes, weight = config[tag], config[tag]["weights"]
    criterion = KMaXCriterion(
        sizes["C"], *(weight[f"loss_{name}"] for name in ("ce", "dice", "mask", "pixel_insdis", "aux_semantic")), sizes["K"], sizes["K"],
        config["pixel_insdis_temperature"], config["aux_semantic_temperature"], dice_count=128 if tag == "video" else None,
    )  # fmt: skip
    names = [*(f"aux{i}" for i in range(sizes["aux"])), "final"]
    leaves = {f"{name}.{part}": given[f"{name}.{part}"].requires_grad_() for name in names for part in PARTS}
    predictions = [Prediction(*(leaves[f"{name}.{part}"] for part in PARTS)) for name in names]
    targets = [
        Target(given[f"target{b}.labels"], given[f"target{b}.masks"].bool(), given[f"target{b}.semantic"]) for b in range(sizes["B"])
    ]
    semantic = given["aux_semantic_pred"].requires_grad_()
    numbers = [given[f"uniform{i}"] for i in range(sizes["aux"] + 2)]
    rest = iter(numbers)
    losses, matched = criterion(predictions, targets, semantic, random=lambda shape: next(rest))
    total = criterion.total(losses)
    total.backward()
    for b, m in enumerate(matched):
        yield from (("tap", f"match{b}.{name}", x.numpy()) for name, x in zip(("query", "target", "dice", "class_prob"), (*m.match, m.dice, m.score)))
    areas = torch.stack([m.masks.flatten(1).sum(1) @ m.masks.flatten(1) for m in matched])
    for i, number in enumerate(numbers):
        temperature = criterion.semantic_temperature if i == 1 else criterion.temperature
        yield "tap", f"sample{i}", sample(areas, temperature, sizes["K"], lambda shape, number=number: number).sort().values.numpy()
    yield from (("out", name, loss.detach().reshape(1).numpy()) for name, loss in {**losses, "total": total}.items())
    yield from (("out", f"grad.{name}", leaf.grad.numpy()) for name, leaf in {**leaves, "aux_semantic_pred": semantic}.items())
