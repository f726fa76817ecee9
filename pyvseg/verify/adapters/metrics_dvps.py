# SPDX-License-Identifier: Apache-2.0
"""DVPQ, DSTQ and errors of depth on synthetic panoptic videos with depth."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pyvseg.metrics import dvps
from pyvseg.verify.compare import Rule

_SETTINGS = {"things0-7": (1.25, 1.1), "one_threshold": (1.25,)}


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    config = manifest["config"]
    sequences = list(zip(*(inputs[f"in/{name}"] for name in ("gt_panoptic", "pred_panoptic", "gt_depth", "pred_depth"))))
    yield from _dvpq(config, sequences)
    for name, ratios in _SETTINGS.items():
        for key, values in _dstq(config, sequences, ratios):
            yield f"out/dstq/{name}/{key}", np.array(values, np.float64).reshape(-1)
    errors = [[dvps.depth_errors(*depths) for depths in zip(truth, result)] for _, _, truth, result in sequences]
    for name in dvps.ERRORS:
        yield f"out/depth/{name}", np.array([[frame[name] for frame in frames] for frames in errors]), Rule(1e-5, 1e-5)


def _dvpq(config: dict, sequences: list[tuple]) -> Iterator[tuple[str, np.ndarray]]:
    counts, thresholds = 0, [float(threshold) for threshold in config["depth_thresholds"]]
    for sequence in sequences:
        video = dvps.VideoDVPQ(config["num_classes"], config["windows"], thresholds)
        for frame in zip(*sequence):
            video.update(*frame)
        counts = counts + video.counts
    for threshold, of_threshold in zip(config["depth_thresholds"], counts):
        for k, of_window in zip(config["windows"], of_threshold):
            iou, tp, fp, fn = of_window.T
            value = np.array(dvps.dvpq(of_window, config["num_things"]))
            yield f"out/dvpq/k{k}_{threshold}/per_class", np.stack((iou, tp, fn, fp))
            yield f"out/dvpq/k{k}_{threshold}/value", value
            yield f"out/dvpq/k{k}_{threshold}/printed", np.round(value, 3)


def _dstq(config: dict, sequences: list[tuple], ratios: tuple[float, ...]) -> Iterator[tuple[str, object]]:
    counts = []
    for sequence in sequences:
        video = dvps.SequenceDSTQ(config["num_classes"], config["stq"]["things"], ratios)
        for frame in zip(*sequence):
            video.update(*frame)
        counts.append(video.counts())
    total, each = dvps.dstq(counts), [dvps.dstq([one]) for one in counts]
    for name, ours in {"DSTQ": "DSTQ", "STQ": "STQ", "AQ": "AQ", "IoU": "SQ", "DQ": "DQ"}.items():
        yield name, total[ours]
    for i, ratio in enumerate(ratios):
        for name in ("DQ", "DSTQ"):
            yield f"{name}@{ratio}", total[f"{name} by ratio"][i]
            yield f"{name}_per_seq@{ratio}", [one[f"{name} by ratio"][i] for one in each]
    for name, ours in {"STQ_per_seq": "STQ", "AQ_per_seq": "AQ", "IoU_per_seq": "SQ"}.items():
        yield name, [one[ours] for one in each]
    yield "ID_per_seq", range(len(sequences))
    yield "Length_per_seq", [len(sequence[0]) for sequence in sequences]
