# SPDX-License-Identifier: Apache-2.0
"""`pyvseg run`"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from pyvseg.engine.recipe import Recipe
from pyvseg.errors import PyvsegError


@dataclass
class Run:
    """Follow objects through a video: from masks at one or more frames to masks at every frame, or find them all by their class.

    For one video OUT receives overlay.mp4, masks/ (palette PNGs) and masks.json (COCO RLE). For example

        pyvseg run video.mp4 --mask first_frame.png
        pyvseg run frames/ --mask objects.json --model stcn_r50 --weights stcn.pth --out results
        pyvseg run DAVIS --sequences DAVIS/ImageSets/2017/val.txt --out results
        pyvseg run street.mp4 --model ctvis_r50_ytvis19 --weights CTVIS_checkpoint.pth
        pyvseg run ytvis_2019/valid.json --model ctvis_r50_ytvis19 --weights CTVIS_checkpoint.pth --no-pngs --no-overlay
        pyvseg run street.mp4 --model transvod_r50_vid --weights TransVOD_checkpoint.pth

    Models for panoptic segmentation need no masks; of them OUT receives pan_pred/VIDEO (PNGs) with pred.json, as VIPSeg has them, and
    overlay.mp4, of models for semantic segmentation also semantic/VIDEO (PNGs, pixel = class + 1), as VSPW has them, of models that see
    depth also depth/VIDEO (16-bit PNGs, 256 to a metre), as Cityscapes-DVPS has it. Models for video instance segmentation need none
    either; of them OUT receives results.json (YouTube-VIS results), overlay.mp4 and masks/, of models for video object detection
    results.json (COCO results) and overlay.mp4. Both also take a folder of videos, or the JSON or the folder of a YouTube-VIS or OVIS
    split, for detection of ImageNet VID: then one results.json holds all of them, as the evaluation wants it.

    Ctrl-C stops at the end of a clip; the same command with --resume goes on and gives the same masks.
    """

    video: tyro.conf.Positional[Path]
    """An MP4/AVI/MKV, a folder of images, or a DAVIS/YouTube-VOS folder (with JPEGImages and Annotations). Instance segmentation:
    also a folder of videos, or a YouTube-VIS/OVIS split (its JSON, or the folder that holds it)."""
    recipe: Recipe = field(default_factory=Recipe)
    mask: tuple[Path, ...] = ()
    """The first frame's mask: a palette PNG (pixel = object id), one binary PNG per object, a folder of either, or a JSON of
    polygons, boxes or COCO RLE."""
    out: Path = Path("output")
    """Folder for the results."""
    frames: str | None = None
    """Only this part of one video, START:STOP, counted from 0 (100: = from frame 100 on)."""
    annotations: Literal["auto", "first", "all"] = "auto"
    """Datasets: use each sequence's first mask, or all; auto = first where every frame is annotated."""
    sequences: list[str] = field(default_factory=list)
    """Datasets: names of sequences, or a text file that lists them."""
    overwrite: bool = False
    """Replace results that are already in OUT."""
    resume: bool = False
    """Go on with an interrupted run in OUT."""


def run(options: Run) -> None:
    from pyvseg.engine.allocator import keep_freed_memory
    from pyvseg.engine.run import run as run_task

    keep_freed_memory()
    bounds, recipe = _frame_range(options.frames), options.recipe
    if options.mask and not recipe.needs_masks:
        raise PyvsegError(f"{recipe.model} finds the objects itself; leave --mask out")
    if not recipe.needs_masks and not options.video.exists():
        raise PyvsegError(f"{options.video}: no such file")
    summary = run_task(
        recipe.task(), options.video, list(options.mask) or None, out=options.out, overwrite=options.overwrite, resume=options.resume,
        frames=bounds, annotations=options.annotations, sequences=options.sequences,
    )  # fmt: skip
    for what, where in summary.written:
        print(f"{what:13}   {where}")
    if summary.frames:
        print(f"{summary.frames} frames in {summary.seconds:.1f} s: {summary.fps:.1f} frames per second, reading and writing included")
    else:
        print("nothing left to do", file=sys.stderr)


def _frame_range(text: str | None) -> tuple[int, int | None] | None:
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return int(start or 0), int(stop) if stop else None
    except ValueError:
        raise PyvsegError(f"--frames {text}: expected START:STOP, for example 0:100") from None
