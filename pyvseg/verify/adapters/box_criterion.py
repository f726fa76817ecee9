# SPDX-License-Identifier: Apache-2.0
"""The criterion of the TransVOD systems on stored predictions and targets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pyvseg.models.video_detector import Prediction
from pyvseg.training.box_criterion import BoxCriterion, Target, cardinality_error, class_error


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    config = manifest["config"]
    criterion = BoxCriterion(config["cost_class"], config["cost_bbox"], config["cost_giou"], config["focal_alpha"], config["focal_gamma"])
    logits, boxes = (torch.from_numpy(inputs[f"in/{name}"]).requires_grad_() for name in ("logits", "boxes"))
    predictions = [Prediction(*layer) for layer in zip(logits, boxes)]
    targets = [Target(*(torch.from_numpy(inputs[f"in/target{b}_{part}"]) for part in Target._fields)) for b in range(config["batch"])]
    losses, matches = criterion(predictions, targets)
    total = criterion.total(losses)
    total.backward()
    last = len(predictions) - 1
    for i, prediction in enumerate(predictions):
        suffix = "" if i == last else f"_{i}"
        losses[f"cardinality_error{suffix}"] = cardinality_error(prediction.logits, targets)
        yield from ((f"out/match{i}_{b}", torch.stack(match).numpy()) for b, match in enumerate(matches[i]))
    losses |= {"class_error": class_error(predictions[-1].logits, targets, matches[-1]), "total": total}
    yield from ((f"out/{name}", loss.detach().reshape(1).numpy()) for name, loss in losses.items())
    yield "out/grad_logits", logits.grad.numpy()
    yield "out/grad_boxes", boxes.grad.numpy()
