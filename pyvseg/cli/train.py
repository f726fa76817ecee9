# SPDX-License-Identifier: Apache-2.0
"""`pyvseg train`"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from pyvseg.errors import PyvsegError


@dataclass
class Train:
    """Train a semi-supervised model on still images with masks and on annotated videos.

    Two stages make a model: `--clip-lengths 1 1` on sequences synthesised from images (STCN's recipe), then
    `--clip-lengths 3 2` starting from its result, which trains the clip refinement too. For example

        pyvseg train --images photos:masks --coco instances.json:images --out runs/static --backbone efficientnet_lite0.pth
        pyvseg train --images photos:masks --videos clips:masks --clip-lengths 3 2 --weights runs/static/model.safetensors --out runs/clips

    Stop it at any time; the same command goes on. Under `torchrun` every process takes its share.
    """

    out: Path
    """Folder for model.safetensors, log.jsonl and resume.pt."""
    model: str = "pcvos_tiny"
    """A name of `pyvseg models`."""
    weights: Path | None = None
    """Start from these weights of the same model."""
    backbone: Path | None = None
    """Start the key encoder from an ImageNet checkpoint (EfficientNet-Lite0)."""
    images: list[str] = field(default_factory=list)
    """IMAGES:MASKS folders; masks are PNGs of the same names, every value above zero is the object."""
    coco: list[str] = field(default_factory=list)
    """INSTANCES.json:IMAGES in COCO format."""
    videos: list[str] = field(default_factory=list)
    """FRAMES:MASKS folders, one pair per video; masks are palette PNGs of the same names."""
    clip_lengths: list[int] = field(default_factory=lambda: [1, 1])
    """Frames per clip after the given first frame; memory grows after each clip."""
    iterations: int = 4000
    batch: int = 4
    size: int = 224
    """Side of the square crops in pixels, a multiple of 16."""
    rate: float = 5e-4
    video_share: float = 0.1
    """Share of samples that come from the videos."""
    workers: int = 1
    threads: int | None = None
    seed: int = 0
    device: str | None = None


def train(options: Train) -> None:
    import torch
    import torch.distributed as dist

    from pyvseg import checkpoints
    from pyvseg.checkpoints import key_maps
    from pyvseg.models import zoo
    from pyvseg.models.stcn import STCN
    from pyvseg.training.data import AnnotatedVideo, CocoInstances, MaskFolder, Mixture
    from pyvseg.training.loop import Schedule
    from pyvseg.training.loop import train as run

    if options.size % 16 or options.size < 64:
        raise PyvsegError(f"--size {options.size}: must be a multiple of 16 and at least 64")
    sources = [MaskFolder(*_pair(p)) for p in options.images] + [CocoInstances(*_pair(p)) for p in options.coco]
    if not sources:
        raise PyvsegError("no training images: give --images IMAGES:MASKS or --coco INSTANCES.json:IMAGES")
    if options.threads:
        torch.set_num_threads(options.threads)
    if "RANK" in os.environ:
        dist.init_process_group()
    torch.manual_seed(options.seed)
    settings = zoo.variant(options.model).settings
    if options.weights:
        model = zoo.build(settings, checkpoints.read(options.weights), name=str(options.weights))
    else:
        model = STCN(settings)
    if options.backbone:
        state = checkpoints.read(options.backbone)
        ignored = key_maps.EFFICIENTNET_LITE_IGNORED
        checkpoints.load_into(model.key_encoder, state, key_maps.EFFICIENTNET_LITE, name=str(options.backbone), ignore=ignored)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device, memory_format=torch.channels_last)
    clips, start = [], 1
    for length in options.clip_lengths:
        clips.append(tuple(range(start, start + length)))
        start += length
    videos = [AnnotatedVideo(*_pair(p)) for p in options.videos]
    data = Mixture(sources, videos, start, options.size, options.seed, options.video_share)
    schedule = Schedule(options.iterations, options.batch, tuple(clips), options.rate)
    run(model, data, schedule, options.out, workers=options.workers)


def _pair(text: str) -> tuple[Path, Path]:
    first, colon, second = text.partition(":")
    paths = Path(first), Path(second)
    if not colon:
        raise PyvsegError(f"{text}: two paths joined by a colon are needed")
    for path in paths:
        if not path.exists():
            raise PyvsegError(f"{path}: no such file or folder")
    return paths
