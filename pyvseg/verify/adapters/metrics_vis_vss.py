# SPDX-License-Identifier: Apache-2.0
"""The YouTube-VIS evaluation on two JSON documents, and the VSPW evaluation on label videos."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pyvseg.datasets.vis_tracks import VISTracks
from pyvseg.metrics import vis, vss


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    yield from _vis(inputs) if "in/results_json" in inputs else _vss(inputs)


def _vis(inputs: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.json" for name in ("ground_truth", "results")]
        for path in paths:
            path.write_bytes(inputs[f"in/{path.stem}_json"].tobytes())
        tracks = VISTracks(paths[0], paths[1:])
    videos = sorted(tracks.videos.values(), key=lambda video: video.id)
    averages = vis.average((vis.match_video(tracks.truth(video), tracks.result(video)) for video in videos), sorted(tracks.categories))
    yield "out/stats", np.nan_to_num(np.array(list(vis.summary(averages).values())), nan=-1)
    yield "out/precision", averages.precision
    yield "out/recall", averages.recall


def _vss(inputs: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    counts, consistencies = 0, []
    for i in range(sum(name.startswith("in/label") for name in inputs)):
        consistency = vss.Consistency()
        for label, result in zip(inputs[f"in/label{i}"], inputs[f"in/pred{i}"]):
            counts = counts + vss.histogram(label, result)
            consistency.update(label, result)
        consistencies.append(consistency.values())
    yield "out/standard", np.array(list(vss.accuracy(counts).values()))
    yield "out/raw_script", np.array(list(vss.accuracy_of_raw_values(counts).values()))
    for n, mean in vss.mean_consistency(consistencies).items():
        yield f"out/mvc{n}", np.array([mean])
        yield f"out/vc{n}_windows", np.concatenate([values[n] for values in consistencies])
