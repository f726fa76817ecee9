# SPDX-License-Identifier: Apache-2.0
"""VIPSeg and KITTI-STEP: VPQ and STQ of panoptic videos, from one pass over the PNGs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pyvseg.cli.protocols.videos import chosen, folders_of, named, read_ahead, same_frames
from pyvseg.datasets.coco_panoptic import PanopticVideos
from pyvseg.datasets.kitti_step import CLASSES, THINGS, KittiStep, pngs
from pyvseg.datasets.vipseg import VIPSeg
from pyvseg.errors import PyvsegError
from pyvseg.metrics import stq, vpq
from pyvseg.metrics.panoptic import Frame, Pairs, count_frame, count_labels
from pyvseg.video.panoptic import read_ids, read_step

if TYPE_CHECKING:
    from pyvseg.cli.eval import Eval

COLUMNS = ("VPQ", "VPQ-Things", "VPQ-Stuff", "STQ", "AQ", "SQ")

Counted = Iterator[tuple[Frame, Pairs]]  # a frame for VPQ, and its pairs of labels for STQ


class Task(NamedTuple):
    """What is to be scored."""

    names: list[str]
    classes: dict[int, str]
    things: list[int]
    count: Callable[[str], Counted]  # the frames of a video


class Score(NamedTuple):
    """One video, or all."""

    vpq: np.ndarray  # (windows, classes, 4)
    stq: list[stq.Counts]


def evaluate(options: Eval) -> tuple[dict, list[str]]:
    if not options.windows or min(options.windows) < 1:
        raise PyvsegError(f"--windows {' '.join(map(str, options.windows))}: lengths in frames, each at least 1")
    dataset, task = (_vipseg if options.protocol == "vipseg" else _kitti_step)(options)
    scores = {name: _score(task, name, options.windows) for name in task.names}
    total = Score(sum(each.vpq for each in scores.values()), [counts for each in scores.values() for counts in each.stq])
    table = _tabulate(task, options.windows, scores, total) | {"left_out": [name for name in dataset if name not in scores]}
    return table, _lines(table)


def _vipseg(options: Eval) -> tuple[list[str], Task]:
    dataset = VIPSeg(options.gt, options.image_set or "val")
    if not dataset.categories:
        raise PyvsegError(f'{dataset.lists}: no "categories" in there; make the annotation\'s JSON again')
    if max(dataset.categories) >= stq.IGNORE:
        raise PyvsegError(f"{dataset.lists}: category id {max(dataset.categories)}; ids must be below {stq.IGNORE}, which is void")
    results = PanopticVideos(options.results / "pred.json", options.results / "pan_pred")
    if results.categories and results.categories.keys() != dataset.categories.keys():
        other = sorted(results.categories.keys() ^ dataset.categories.keys())[0]
        raise PyvsegError(
            f"{results.lists}: its {len(results.categories)} categories are not the {len(dataset.categories)} of {dataset.lists.name}: "
            f"{other} is in one of them only; use a model of this data set"
        )
    names = chosen(options, dataset.videos(), results.videos(), results.lists)
    classes = {key: category.name for key, category in dataset.categories.items()}
    things = [key for key, category in dataset.categories.items() if category.is_thing]
    return dataset.videos(), Task(names, classes, things, lambda name: _count_lists(dataset, results, name))


def _count_lists(dataset: PanopticVideos, results: PanopticVideos, name: str) -> Counted:
    truth, result = dataset.segments(name), results.segments(name)
    same_frames(results.lists, truth, result)
    known = np.array(list(dataset.categories))
    for source, lists in ((dataset, truth), (results, result)):
        listed = np.concatenate([segments.classes for segments in lists.values()] or [known])
        if (wrong := ~np.isin(listed, known)).any():
            raise PyvsegError(f"{source.lists} has category {listed[wrong][0]}, which is none of the {len(known)} of {dataset.lists.name}")
    labels = zip(*(stq.number_segments(list(lists.values())) for lists in (truth, result)))
    maps = zip(*(read_ahead(read_ids, source.maps(name).values()) for source in (dataset, results)))
    for stem, of_map, (truth_labels, result_labels) in zip(truth, maps, labels):
        with named(stem):
            frame = count_frame(*of_map, truth[stem], result[stem], int(known.max()) + 1)
        pairs = frame.pairs
        yield frame, Pairs(stq.relabel(pairs.truth, truth[stem], truth_labels), stq.relabel(pairs.result, result[stem], result_labels), pairs.pixels)


def _kitti_step(options: Eval) -> tuple[list[str], Task]:
    dataset = KittiStep(options.gt, options.image_set or "val")
    results = options.results
    names = chosen(options, dataset.sequences(), folders_of(results), results)

    def count(name: str) -> Counted:
        truth, result = dataset.maps(name), pngs(results / name)
        same_frames(results / name, truth, result)
        for stem, *labels in zip(truth, *(read_ahead(_read_step_labels, paths.values()) for paths in (truth, result))):
            with named(stem):
                counted = count_labels(*labels, len(CLASSES), THINGS)
            yield counted

    return dataset.sequences(), Task(names, dict(enumerate(CLASSES)), list(THINGS), count)


def _read_step_labels(path: Path) -> np.ndarray:
    classes, instances = read_step(path)
    return (classes.astype(np.int32) << stq.BITS) | instances


def _score(task: Task, name: str, windows: tuple[int, ...]) -> Score:
    num_classes = max(task.classes) + 1
    tubes, sequence = vpq.VideoPQ(num_classes, windows), stq.SequenceSTQ(num_classes, task.things)
    with named(name):
        for frame, labels in task.count(name):
            tubes.update(frame)
            sequence.update(labels)
    return Score(tubes.counts, [sequence.counts()])


def _tabulate(task: Task, windows: tuple[int, ...], scores: dict[str, Score], total: Score) -> dict:
    def numbers(score: Score) -> dict[str, float]:
        return dict(zip(COLUMNS, (*vpq.totals(score.vpq, task.things).values(), *stq.quality(score.stq))))

    per_class = {name: vpq.quality(counts) for name, counts in zip(windows, total.vpq)}
    return {
        "totals": numbers(total),
        "windows": {str(n): vpq.means(counts, task.things) for n, counts in zip(windows, total.vpq)},
        "classes": {name: {f"PQ, window {n}": float(each.pq[key]) for n, each in per_class.items()} for key, name in task.classes.items()},
        "sequences": {name: numbers(score) for name, score in scores.items()},
    }


def _lines(table: dict) -> list[str]:
    width = max(len("sequence"), *map(len, table["sequences"])) + 2
    rows = {**table["sequences"], "total": table["totals"]}
    digits = [2 if column.startswith("VPQ") else 4 for column in COLUMNS]  # percent, and fractions, as each is published
    lines = [f"{'sequence':<{width}}" + "".join(f"{column:>12}" for column in COLUMNS)]
    lines += [f"{name:<{width}}" + "".join(f"{row[column]:>12.{n}f}" for column, n in zip(COLUMNS, digits)) for name, row in rows.items()]
    shown = (f"{n}: " + " / ".join(f"{100 * each['pq']:.2f}" for each in groups.values()) for n, groups in table["windows"].items())
    return [*lines, f"VPQ by window, all / things / stuff: {', '.join(shown)}"]
