# SPDX-License-Identifier: Apache-2.0
"""YouTube-VIS and OVIS: AP and AR of tracks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyvseg.datasets.vis_tracks import Video, VISTracks
from pyvseg.errors import PyvsegError
from pyvseg.metrics import vis

if TYPE_CHECKING:
    from pyvseg.cli.eval import Eval


def evaluate(options: Eval) -> tuple[dict, list[str]]:
    if options.image_set is not None:
        raise PyvsegError(f"--image-set {options.image_set}: this protocol has none; give --gt the JSON of the split")
    dataset = VISTracks(options.gt, _files(options.results))
    if unknown := [name for name in options.sequences if name not in dataset.videos]:
        raise PyvsegError(f"{dataset.path}: no video {unknown[0]!r} among its {len(dataset.videos)}, which are named like the folders of their images")
    videos = [video for video in dataset.videos.values() if not options.sequences or video.name in options.sequences]
    if not any(video.annotations for video in videos):
        raise PyvsegError(f"{dataset.path}: no track is annotated in these {len(videos)} videos, so there is nothing to score")
    averages = vis.average((vis.match_video(dataset.truth(video), dataset.result(video)) for video in videos), sorted(dataset.categories))
    table = {
        "totals": vis.summary(averages),
        "categories": {dataset.categories[key]: numbers for key, numbers in _by_category(averages, sorted(dataset.categories)).items()},
        "without_results": [video.name for video in videos if not video.results],
        "left_out": [name for name in dataset.videos if name not in {video.name for video in videos}],
    }
    return table, _lines(table, videos)


def _files(results: Path) -> list[Path]:
    """The file itself, that of one run, or those of many runs."""
    if results.is_file():
        return [results]
    one = results / "results.json"
    found = [one] if one.is_file() else sorted(results.glob("*/results.json"))
    if not found:
        raise PyvsegError(f"{results}: neither a JSON of tracks nor a folder with results.json, or with folders that have one")
    return found


def _by_category(averages: vis.Averages, categories: list[int]) -> dict[int, dict[str, float]]:
    """AP, AP50, AP75, ... of each category that is annotated."""
    each = {key: vis.Averages(averages.precision[:, :, k : k + 1], averages.recall[:, k : k + 1]) for k, key in enumerate(categories)}
    return {key: vis.summary(of) for key, of in each.items() if (of.recall[:, 0, 0] > -1).any()}


def _lines(table: dict, videos: list[Video]) -> list[str]:
    width = max(len("category"), *map(len, table["categories"])) + 2
    columns = ("AP", "AP50", "AP75", "AR1", "AR10")  # what servers and papers report
    lines = [f"{'category':<{width}}" + "".join(f"{column:>8}" for column in columns)]
    for name, numbers in {**table["categories"], "total": table["totals"]}.items():
        lines.append(f"{name:<{width}}" + "".join(f"{100 * numbers[column]:>8.1f}" for column in columns))
    if missing := table["without_results"]:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        lines.append(f"{len(missing)} of {len(videos)} videos have no results, so all their tracks count as missed ({shown})")
    return lines
