# SPDX-License-Identifier: Apache-2.0
"""The criterion of Mask2Former on stored predictions, targets and random numbers; with it the contrastive loss of CTVIS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyvseg.training.contrastive import contrastive_losses, match_frames
from pyvseg.training.set_criterion import SetCriterion, Target


class Given(NamedTuple):
    logits: Tensor
    masks: Tensor


class StoredNumbers:
    """Hands out the stored random numbers in their order, checking that the shape asked for is the stored one."""

    def __init__(self, inputs: dict[str, np.ndarray]) -> None:
        self.rest = [torch.from_numpy(inputs[key]) for key in sorted(k for k in inputs if k.startswith("in/rand."))]

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        numbers = self.rest.pop(0)
        if numbers.shape != shape:
            raise ValueError(f"random numbers of shape {shape} are asked for, the case stores {tuple(numbers.shape)} next")
        return numbers


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    config = manifest["config"]
    weight = config["weights"]
    criterion = SetCriterion(
        config["classes"], config["points"], config["oversample"], config["importance"], config["eos"], weight["class"], weight["mask"], weight["dice"]
    )
    parts = ("logits", "masks")
    predictions = [Given(*(torch.from_numpy(inputs[f"in/pred_{p}.{i}"]).requires_grad_() for p in parts)) for i in range(config["predictions"])]
    random = StoredNumbers(inputs)
    clips = [Target(torch.from_numpy(inputs[f"in/labels.{b}"]), torch.from_numpy(inputs[f"in/target_masks.{b}"]).float()) for b in _numbers(inputs)]
    present = [torch.from_numpy(inputs[f"in/present.{b}"]).bool() for b in _numbers(inputs)] if config["kind"] == "ctvis" else []
    targets = _frames(clips, present) if present else clips
    losses, matches = criterion(predictions, targets, random=random)
    criterion.total(losses).backward()
    for name, loss in losses.items():
        yield f"out/{name}", loss.detach().reshape(1).numpy()
    ordered = [match for one in (matches[-1], *matches[:-1]) for match in one]
    step = 3 if present else 1  # of the images whose mask gradients are stored
    for tag, prediction in (("final", predictions[-1]), ("aux0", predictions[0])):
        yield f"out/grad_logits_{tag}", prediction.logits.grad.numpy()
        yield f"out/grad_masks_{tag}", prediction.masks.grad[::step].numpy()
    if present:
        embeddings = torch.from_numpy(inputs["in/pred_embeds"])
        by_frame = match_frames(criterion, predictions[-1], clips, random)
        ordered += [match for frame in by_frame for match in frame]
        yield from _contrastive(config, embeddings, by_frame, present)
    for i, (queries, found) in enumerate(ordered):
        yield f"out/match.{i:03d}", torch.stack([queries, found]).numpy()


def _numbers(inputs: dict[str, np.ndarray]) -> range:
    return range(sum(key.startswith("in/labels.") for key in inputs))


def _frames(clips: list[Target], present: list[Tensor]) -> list[Target]:
    """One target per frame, of the instances that are there."""
    return [
        Target(clip.labels[there], clip.masks[there, t])
        for clip, visible in zip(clips, present)
        for t, there in enumerate(visible.unbind(1))
    ]


def _contrastive(config: dict, embeddings: Tensor, matches: list, present: list[Tensor]) -> Iterator[tuple]:
    for tag, coin in (("momentum", 0.9), ("last", 0.1)):
        x = embeddings.clone().requires_grad_()
        reid, aux = contrastive_losses(x, matches, present, coin=lambda coin=coin: coin)
        reid, aux = config["weights_cl"]["reid"] * reid, config["weights_cl"]["aux"] * aux
        (reid + aux).backward()
        yield f"out/loss_reid_{tag}", reid.detach().reshape(1).numpy()
        yield f"out/loss_aux_reid_{tag}", aux.detach().reshape(1).numpy()
        yield f"out/grad_embeds_{tag}", x.grad.numpy()
