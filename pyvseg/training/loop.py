# SPDX-License-Identifier: Apache-2.0
"""The training loop of semi-supervised models: one process here, several under torchrun."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from pyvseg import checkpoints
from pyvseg.errors import CheckpointError
from pyvseg.models.stcn import STCN
from pyvseg.training.data import MAX_OBJECTS, Mixture
from pyvseg.training.losses import BootstrappedCrossEntropy
from pyvseg.training.vos import training_pass


@dataclass(frozen=True)
class Schedule:
    """iterations  optimiser steps of this stage
    batch          samples per step and process
    clips          frame indices of each clip; frame 0 is given, so [[1], [2]] is STCN's stage and [[1, 2, 3], [4, 5]] trains the refinement
    rate           peak learning rate of new layers; the pretrained encoder gets `encoder_share` of it
    average        decay of the running average of the weights, which is what is saved
    """

    iterations: int
    batch: int = 4
    clips: tuple[tuple[int, ...], ...] = ((1,), (2,))
    rate: float = 5e-4
    encoder_share: float = 0.3
    weight_decay: float = 1e-4
    average: float = 0.998
    save_every: int = 200


def train(model: STCN, data: Mixture, schedule: Schedule, out: Path, *, workers: int = 1) -> None:
    """Train `model` in place; OUT/model.safetensors holds the averaged weights in half precision, OUT/resume.pt what a restart needs.

    A run that finds OUT/resume.pt goes on from there. Raises CheckpointError when that file does not fit.
    """
    out.mkdir(parents=True, exist_ok=True)
    _freeze(model)
    device = next(model.parameters()).device
    wrapped = nn.parallel.DistributedDataParallel(_Pass(model)) if dist.is_initialized() else _Pass(model)
    optimizer = torch.optim.AdamW(_groups(model, schedule), weight_decay=schedule.weight_decay)
    average = copy.deepcopy(model)
    criterion = BootstrappedCrossEntropy(schedule.iterations // 4, schedule.iterations * 3 // 4, top_share=0.3)
    first = _resume(out / "resume.pt", model, average, optimizer)
    loader = iter(DataLoader(_reseeded(data, first), batch_size=schedule.batch, num_workers=workers))
    clips = [list(c) for c in schedule.clips]
    progress = tqdm(range(first, schedule.iterations), initial=first, total=schedule.iterations, disable=_rank() > 0, mininterval=5)
    log, since = (out / "log.jsonl").open("a"), time.perf_counter()
    for iteration in progress:
        factor = _rate(iteration, schedule.iterations)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        images, labels = (x.to(device) for x in next(loader))
        loss = _loss(wrapped, model, images, labels, clips, criterion, iteration)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not math.isfinite(norm):
            continue  # one sample without a finite gradient must not end the run
        optimizer.step()
        _average(average, model, min(schedule.average, (iteration + 1) / (iteration + 10)))
        if iteration % 20 == 0 and _rank() == 0:
            row = {"iteration": iteration, "loss": loss.item(), "norm": norm.item(), "seconds": time.perf_counter() - since}
            progress.set_postfix(loss=f"{row['loss']:.3f}")
            print(json.dumps(row), file=log, flush=True)
        if ((iteration + 1) % schedule.save_every == 0 or iteration + 1 == schedule.iterations) and _rank() == 0:
            _save(out, model, average, optimizer, iteration + 1, schedule)


class _Pass(nn.Module):
    """The training pass as a module's forward, which is what DistributedDataParallel wraps."""

    def __init__(self, model: STCN) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments) -> dict[int, Tensor]:
        return training_pass(self.model, *arguments)


def _loss(wrapped, model, images, labels, clips, criterion, iteration) -> Tensor:
    settings = model.settings
    frames = images.permute(0, 1, 4, 2, 3) / 255
    mean, std = (frames.new_tensor(x).view(3, 1, 1) for x in (settings.mean, settings.std))
    selector = torch.stack([(labels[:, 0] == i).flatten(1).any(1) for i in range(1, MAX_OBJECTS + 1)], 1).float()
    masks = torch.stack([labels[:, 0] == i for i in range(1, MAX_OBJECTS + 1)], 1).float()
    with torch.autocast(images.device.type, torch.bfloat16):
        logits = wrapped((frames - mean) / std, masks, selector, clips)
    objects = selector.sum(1).long()
    losses = [criterion(scores, labels[:, t].long(), objects, iteration) for t, scores in logits.items()]
    return torch.stack(losses).mean()


def _freeze(model: STCN) -> None:
    """Batch norms keep their statistics; the pretrained stem and stride-4 stage stay as they are."""
    model.eval()
    blocks = getattr(model.key_encoder, "blocks", None)
    if blocks is not None:
        for part in (model.key_encoder.conv, model.key_encoder.bn, *blocks[:3]):
            part.requires_grad_(False)


def _groups(model: STCN, schedule: Schedule) -> list[dict]:
    encoder = [p for p in model.key_encoder.parameters() if p.requires_grad]
    chosen = {id(p) for p in model.key_encoder.parameters()}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    rates = (schedule.rate * schedule.encoder_share, schedule.rate)
    return [{"params": p, "lr": r, "initial_lr": r} for p, r in zip((encoder, rest), rates)]


def _rate(iteration: int, total: int, warmup: int = 100) -> float:
    return min(1.0, (iteration + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * iteration / total)))


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for a, p in zip(average.parameters(), model.parameters()):
        a.lerp_(p, 1 - decay)


def _save(out: Path, model, average, optimizer, iteration: int, schedule: Schedule) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in average.state_dict().items()}
    metadata = {"iterations": str(iteration), "schedule": json.dumps(asdict(schedule))}
    checkpoints.write(out / "model.safetensors", half, metadata)
    partial = out / "resume.pt.partial"
    states = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**states, "iteration": iteration}, partial)
    os.replace(partial, out / "resume.pt")


def _resume(path: Path, model, average, optimizer) -> int:
    if not path.exists():
        return 0
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        return saved["iteration"]
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be resumed ({str(error).splitlines()[0]}); delete it to start over") from None


def _reseeded(data: Mixture, first: int) -> Mixture:
    """A restart and each process see other samples than the ones before."""
    return Mixture(data.images, data.videos, data.length, data.size, data.seed + 7919 * first + 104_729 * _rank(), data.video_share)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
