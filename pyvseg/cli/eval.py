# SPDX-License-Identifier: Apache-2.0
"""`pyvseg eval`"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from pyvseg.cli.protocols import Protocol, evaluation
from pyvseg.errors import OutputError, PyvsegError


@dataclass
class Eval:
    """Score results against the annotations of a data set, number for number as its published evaluation does.

    --protocol says whose evaluation it is, and with it what RESULTS (PATH) and DATA (--gt) hold:

        davis        J, F and J&F of label PNGs, RESULTS/SEQUENCE/FRAME.png, or of the OUT of `pyvseg run`; DATA/Annotations
        youtube-vis  AP and AR of the results.json in an OUT of `pyvseg run`, or in several; DATA: JSON of YouTube-VIS or OVIS
        vipseg       VPQ and STQ of RESULTS/pred.json with RESULTS/pan_pred/VIDEO/FRAME.png; DATA/panomasksRGB and its JSON
        kitti-step   VPQ and STQ of RESULTS/SEQUENCE/FRAME.png in KITTI-STEP's form; DATA/panoptic_maps
        imagenet-vid AP of the boxes in results.json, as `pyvseg run` writes it; DATA: COCO-style JSON of ImageNet VID
        cityscapes-dvps  DVPQ, DSTQ and errors of depth of RESULTS/pan_pred and RESULTS/depth of `pyvseg run` on DATA/video_sequence/val
        vspw         mIoU and mVC of RESULTS/VIDEO/FRAME.png, pixel = class + 1; DATA/data and val.txt

    For example

        pyvseg eval results --gt DAVIS --image-set 2017/val
        pyvseg eval results --gt YouTubeVIS/valid.json --protocol youtube-vis
        pyvseg eval results --gt VIPSeg_720P --protocol vipseg --json scores.json

    davis: the first frame (given) and the last are not scored, an object is scored from the first annotation on, and totals are
    means over all objects. Annotations of 0 and 255 (DAVIS 2016) are one object; so are results of 0 and 255 where one object is annotated.
    """

    results: tyro.conf.Positional[Path]
    """RESULTS, see above."""
    gt: Path
    """DATA, see above."""
    protocol: Protocol = "davis"
    """Whose evaluation."""
    sequences: tuple[str, ...] = ()
    """Only these; by default every sequence (davis: that has results)."""
    image_set: str | None = None
    """Only this list or split of the data set, such as 2017/val (davis) or train; by default val (davis: all)."""
    windows: tuple[int, ...] = (1, 2, 4, 6)
    """VPQ: the lengths in frames over which it is averaged; the VIPSeg repository's own script takes 1 2 4 6 8."""
    json: Path | None = None
    """Write all numbers there too."""


def eval(options: Eval) -> None:
    try:
        numbers, lines = evaluation(options.protocol)(options)
    except PyvsegError as error:
        other = _looks_like(options.gt)
        hint = f" ({options.gt} looks like --protocol {other})" if other not in (None, options.protocol) else ""
        raise type(error)(f"{error}{hint}") from None
    for line in lines:
        print(line)
    if left_out := numbers["left_out"]:
        shown = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        print(f"not in the totals: {len(left_out)} annotated sequences, not asked for or without results ({shown})")
    if options.json is not None:
        _write_json(options.json, numbers)


def _looks_like(gt: Path) -> Protocol | None:
    if gt.suffix == ".json":
        return "youtube-vis"
    if (gt / "Annotations").is_dir():
        return "davis"
    if (gt / "video_sequence").is_dir():
        return "cityscapes-dvps"
    if (gt / "panoptic_maps").is_dir():
        return "kitti-step"
    if (gt / "data").is_dir():
        return "vspw"
    return "vipseg" if any(gt.glob("panoptic_gt_VIPSeg_*.json")) else None


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(_plain(content), indent=1) + "\n")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None


def _plain(content):
    """JSON has no NaN: a number that does not exist becomes null."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content
