# SPDX-License-Identifier: Apache-2.0
"""VSPW: mIoU and video consistency of label PNGs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyvseg.cli.protocols.videos import chosen, folders_of, named, read_ahead, same_frames
from pyvseg.datasets.vspw import VSPW, images_of
from pyvseg.metrics import vss
from pyvseg.video.png import read_labels

if TYPE_CHECKING:
    from pathlib import Path

    from pyvseg.cli.eval import Eval


def evaluate(options: Eval) -> tuple[dict, list[str]]:
    dataset, results = VSPW(options.gt, options.image_set or "val"), options.results
    names = chosen(options, dataset.videos(), folders_of(results), results)
    counts, consistencies, sequences = np.zeros((256, 256), np.int64), [], {}
    for name in names:
        with named(name):
            own, consistency = _count(dataset, results / name, name)
            sequences[name] = _numbers(own, [consistency])
        counts += own
        consistencies.append(consistency)
    raw = {f"{name}, raw values": value for name, value in vss.accuracy_of_raw_values(counts).items()}
    table = {"totals": _numbers(counts, consistencies) | raw, "sequences": sequences}
    return table | {"left_out": [name for name in dataset.videos() if name not in sequences]}, _lines(table)


def _count(dataset: VSPW, results: Path, name: str) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    labels, found = dataset.labels(name), images_of(results, ".png")
    same_frames(results, labels, found)
    counts, consistency = np.zeros((256, 256), np.int64), vss.Consistency()
    for stem, label, result in zip(labels, *(read_ahead(read_labels, paths.values()) for paths in (labels, found))):
        with named(stem):
            counts += vss.histogram(label, result)
            consistency.update(label, result)
    return counts, consistency.values()


def _numbers(counts: np.ndarray, consistencies: list[dict[int, np.ndarray]]) -> dict[str, float]:
    return vss.accuracy(counts) | {f"mVC{n}": value for n, value in vss.mean_consistency(consistencies).items()}


def _lines(table: dict) -> list[str]:
    total = table["totals"]
    lines = [f"{name:<24}{100 * value:>8.2f}" for name, value in total.items() if "raw" not in name]
    raw = 100 * total["mIoU, raw values"]
    return [*lines, f"mIoU of the script that takes the PNGs' values for classes: {raw:.2f} (the others of that kind: --json)"]
