# SPDX-License-Identifier: Apache-2.0
"""`pyvseg run`"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from pyvseg.errors import PyvsegError

if TYPE_CHECKING:
    from pyvseg.engine.recipe import Recipe


@dataclass
class Run:
    """Follow objects through a video: from masks at one or more frames to masks at every frame, or find them all by their class.

    For one video OUT receives overlay.mp4, masks/ (palette PNGs) and masks.json (COCO RLE). For example

        pyvseg run video.mp4 --mask first_frame.png
        pyvseg run frames/ --mask objects.json --model stcn_r50 --weights stcn.pth --out results
        pyvseg run DAVIS --sequences DAVIS/ImageSets/2017/val.txt --out results
        pyvseg run street.mp4 --model ctvis_r50_ytvis19 --weights CTVIS_checkpoint.pth
        pyvseg run ytvis_2019/valid.json --model ctvis_r50_ytvis19 --weights CTVIS_checkpoint.pth --no-pngs --no-overlay

    Models for panoptic segmentation need no masks; of them OUT receives pan_pred/VIDEO (PNGs) with pred.json, as VIPSeg has them, and
    overlay.mp4. Models for video instance segmentation need none either; of them OUT receives results.json (YouTube-VIS results), overlay.mp4
    and masks/. They also take a folder of videos, or the JSON or the folder of a YouTube-VIS or OVIS split: then one
    results.json holds all of them, as the evaluation server wants it.

    Ctrl-C stops at the end of a clip; the same command with --resume goes on and gives the same masks.
    """

    video: tyro.conf.Positional[Path]
    """An MP4/AVI/MKV, a folder of images, or a DAVIS/YouTube-VOS folder (with JPEGImages and Annotations). Instance segmentation:
    also a folder of videos, or a YouTube-VIS/OVIS split (its JSON, or the folder that holds it)."""
    mask: tuple[Path, ...] = ()
    """The first frame's mask: a palette PNG (pixel = object id), one binary PNG per object, a folder of either, or a JSON of
    polygons, boxes or COCO RLE."""
    model: str = "pcvos_tiny"
    """A name of `pyvseg models`."""
    weights: Path | None = None
    """A published checkpoint or a safetensors file; not needed where weights are bundled."""
    out: Path = Path("output")
    """Folder for the results."""
    clip_length: int | None = None
    """Frames segmented together: longer is faster, shorter follows fast change better. Left out: the model's own number."""
    max_memory_frames: int | Literal["none", "default"] = "default"
    """Frames that the memory holds; none = no bound, as published."""
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None
    """cpu, cuda, cuda:1; left out: CUDA where there is one."""
    frames: str | None = None
    """Only this part of one video, START:STOP, counted from 0 (100: = from frame 100 on)."""
    annotations: Literal["auto", "first", "all"] = "auto"
    """Datasets: use each sequence's first mask, or all; auto = first where every frame is annotated."""
    sequences: list[str] = field(default_factory=list)
    """Datasets: names of sequences, or a text file that lists them."""
    score_threshold: float = 0.3
    """Instance segmentation: tracks of a lower score are left out of masks and overlay; results.json has all."""
    top_k: int | None = None
    """Instance segmentation: so many tracks at most. Left out: the model's published number."""
    compat: bool = True
    """Instance segmentation: each object only once, with its likeliest class; as published it makes a track for each likely one."""
    at_once: int | None = None
    """Instance segmentation: so many videos at a time pass through the network together. Left out: 4 on a GPU, else 1."""
    pngs: bool = True
    """Instance segmentation: leave out the palette PNGs. Without them and the overlay every video is read only once."""
    step_pngs: bool = False
    """Panoptic segmentation: PNGs in the form of KITTI-STEP too."""
    overlay: bool = True
    """Leave out the overlay video."""
    overwrite: bool = False
    """Replace results that are already in OUT."""
    resume: bool = False
    """Go on with an interrupted run in OUT."""


def run(options: Run) -> None:
    from pyvseg.engine.allocator import keep_freed_memory
    from pyvseg.engine.run import run as run_engine

    keep_freed_memory()
    bounds, recipe = _frame_range(options.frames), recipe_of(options)
    if not recipe.needs_masks:
        if options.mask:
            raise PyvsegError(f"{options.model} finds the objects itself; leave --mask out")
        if not options.video.exists():
            raise PyvsegError(f"{options.video}: no such file")
        (_run_panoptic if recipe.is_panoptic else _run_instances)(options, recipe, bounds)
        return
    summary = run_engine(
        recipe.tracker(), options.video, list(options.mask) or None, out=options.out, overlay=options.overlay, overwrite=options.overwrite,
        resume=options.resume, frames=bounds, annotations=options.annotations, sequences=options.sequences,
    )  # fmt: skip
    report(summary)


def recipe_of(options) -> Recipe:
    """Options that are not there keep their defaults."""
    from pyvseg.engine.recipe import Recipe
    from pyvseg.models.vos import DEFAULT_MEMORY_FRAMES

    names = ("model", "weights", "device", "precision", "clip_length", "max_memory_frames", "score_threshold", "top_k", "compat", "pngs", "overlay", "at_once", "step_pngs")
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    if "top_k" in given:
        given["top"] = given.pop("top_k")
    if "max_memory_frames" in given:
        given["max_memory_frames"] = {"none": None, "default": DEFAULT_MEMORY_FRAMES}.get(given["max_memory_frames"], given["max_memory_frames"])
    return Recipe(**given | {"weights": options.weights and str(options.weights)})


def _run_instances(options: Run, recipe: Recipe, bounds: tuple[int, int | None] | None) -> None:
    from pyvseg.engine.run_instances import run_instances

    network, how = recipe.instances()
    summary = run_instances(
        network, options.video, how, out=options.out, overwrite=options.overwrite, resume=options.resume, frames=bounds, sequences=options.sequences
    )
    if options.overlay:
        print(f"overlay video   {options.out / ('overlay.mp4' if summary.single else 'overlays')}")
    if options.pngs:
        print(f"palette PNGs    {options.out / 'masks'}, {summary.shown} objects of score {options.score_threshold} or more")
    of = "" if summary.single else f" of {summary.videos} videos"
    print(f"YouTube-VIS     {options.out / 'results.json'}, {summary.tracks} tracks{of}")
    _report_speed(summary)


def _run_panoptic(options: Run, recipe: Recipe, bounds: tuple[int, int | None] | None) -> None:
    from pyvseg.engine.run_panoptic import run_panoptic

    network, how = recipe.panoptic()
    summary = run_panoptic(
        network, options.video, how, out=options.out, overwrite=options.overwrite, resume=options.resume, frames=bounds, sequences=options.sequences
    )
    if options.overlay:
        print(f"overlay video   {options.out / ('overlay.mp4' if summary.single else 'overlays')}")
    print(f"panoptic PNGs   {options.out / 'pan_pred'}, classes and ids in {options.out / 'pred.json'}")
    if options.step_pngs:
        print(f"STEP PNGs       {options.out / 'step'}")
    _report_speed(summary)


def report(summary) -> None:
    """Says where the results lie and how fast they came."""
    if len(summary.targets) == 1:
        files = summary.targets[0].files
        for what, name in (("overlay video", "overlay.mp4"), ("palette PNGs ", "masks"), ("COCO RLE JSON", "masks.json")):
            if files[name].exists():
                print(f"{what}   {files[name]}")
    else:
        print(f"{len(summary.targets)} sequences   {summary.out}")
    _report_speed(summary)


def _report_speed(summary) -> None:
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
