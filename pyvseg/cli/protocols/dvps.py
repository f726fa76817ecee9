# SPDX-License-Identifier: Apache-2.0
"""Cityscapes-DVPS: DVPQ and DSTQ of panoptic videos with depth, and the errors of depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pyvseg.cli.protocols.videos import chosen, folders_of, named
from pyvseg.datasets.cityscapes_dvps import CLASSES, CityscapesDVPS, read_map
from pyvseg.errors import PyvsegError
from pyvseg.metrics import dvps
from pyvseg.video.depth import read_depth
from pyvseg.video.panoptic import read_ids

if TYPE_CHECKING:
    from pyvseg.cli.eval import Eval

THINGS = 8  # classes 11 to 18 by train id, which the metric has first
_STUFF = CLASSES - THINGS
COLUMNS = ("DVPQ", "DVPQ-Things", "DVPQ-Stuff", "DSTQ", "STQ", "DQ", "abs_rel", "rmse")


class Score(NamedTuple):
    """One sequence, or all: counts (thresholds, windows, classes, 4), what DSTQ is made of, and the errors of each frame's depth."""

    counts: np.ndarray
    dstq: list
    errors: list[dict[str, float]]


def evaluate(options: Eval) -> tuple[dict, list[str]]:
    dataset = CityscapesDVPS(options.gt, options.image_set or "val")
    maps = options.results / "pan_pred"
    names = chosen(options, dataset.sequences(), folders_of(maps), maps)
    scores = {name: _score(dataset, options.results, name) for name in names}
    total = Score(
        sum(each.counts for each in scores.values()), [part for each in scores.values() for part in each.dstq],
        [errors for each in scores.values() for errors in each.errors],
    )  # fmt: skip
    table = {
        "totals": _numbers(total), "sequences": {name: _numbers(each) for name, each in scores.items()},
        "thresholds": {str(t): {str(n): dvps.dvpq(each, THINGS)[0] for n, each in zip(dvps.WINDOWS, part)} for t, part in zip(dvps.THRESHOLDS, total.counts)},
        "left_out": [name for name in dataset.sequences() if name not in scores],
    }  # fmt: skip
    return table, _lines(table)


def _score(dataset: CityscapesDVPS, results: Path, name: str) -> Score:
    tubes, sequence, errors = dvps.VideoDVPQ(CLASSES), dvps.SequenceDSTQ(CLASSES, range(THINGS)), []
    for frame in dataset.frames(name):
        with named(f"{name}, {frame.image.stem}"):
            classes, instances = read_map(frame.map)
            truth = _ids(classes, instances, dvps.VOID)
            values = read_ids(results / "pan_pred" / name / frame.image.name)
            categories, tracks = np.divmod(values, dvps.DIVISOR)
            result = _ids(np.where(values > 0, categories, CLASSES), tracks, CLASSES)
            depths = read_depth(frame.depth), read_depth(results / "depth" / name / frame.image.name)
            tubes.update(truth, result, *depths)
            sequence.update(truth, result, *depths)
            errors.append(dvps.depth_errors(*depths))
    return Score(tubes.counts, [sequence.counts()], errors)


def _ids(classes: np.ndarray, instances: np.ndarray, void: int) -> np.ndarray:
    """Things first, stuff without instances. Raises PyvsegError for an instance beyond the divisor."""
    if instances.max(initial=0) >= dvps.DIVISOR:
        raise PyvsegError(f"instance {instances.max()}; there is room for {dvps.DIVISOR}")
    table = np.array([*range(THINGS, CLASSES), *range(THINGS)], np.int32)
    known = classes < CLASSES
    ours = table[np.where(known, classes, 0)]
    return np.where(known, ours * dvps.DIVISOR + np.where(ours < THINGS, instances, 0), void * dvps.DIVISOR)


def _numbers(score: Score) -> dict[str, float]:
    """DVPQ is the mean over windows and finite thresholds."""
    finite = [i for i, threshold in enumerate(dvps.THRESHOLDS) if np.isfinite(threshold)]
    quality = np.mean([dvps.dvpq(each, THINGS) for i in finite for each in score.counts[i]], 0).tolist()
    segmentation = dvps.dstq(score.dstq)
    errors = {key: float(np.nanmean([each[key] for each in score.errors])) for key in dvps.ERRORS}
    return dict(zip(COLUMNS, (*quality, *(segmentation[key] for key in ("DSTQ", "STQ", "DQ"))))) | errors


def _lines(table: dict) -> list[str]:
    width = max(len("sequence"), *map(len, table["sequences"])) + 2
    rows = {**table["sequences"], "total": table["totals"]}
    lines = [f"{'sequence':<{width}}" + "".join(f"{column:>13}" for column in COLUMNS)]
    lines += [f"{name:<{width}}" + "".join(f"{row[column]:>13.{2 if 'DVPQ' in column else 4}f}" for column in COLUMNS) for name, row in rows.items()]
    shown = (f"{t}: " + " / ".join(f"{each:.2f}" for each in windows.values()) for t, windows in table["thresholds"].items())
    return [*lines, f"DVPQ by threshold of depth, windows of {', '.join(map(str, dvps.WINDOWS))}: {'; '.join(shown)}"]
