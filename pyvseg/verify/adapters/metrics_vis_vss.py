# SPDX-License-Identifier: Apache-2.0
"""The YouTube-VIS evaluation on two JSON documents, and the VSPW evaluation on label videos."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pyvseg.datasets.vis_tracks import VISTracks
from pyvseg.metrics import vis


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    yield from _vis(inputs)


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
