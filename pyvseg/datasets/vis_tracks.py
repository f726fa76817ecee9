# SPDX-License-Identifier: Apache-2.0
"""Annotated and found tracks in the form of YouTube-VIS, for scoring: JSON in, run lengths out. No images are needed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pyvseg.datasets.youtube_vis import annotation_file
from pyvseg.errors import PyvsegError
from pyvseg.metrics.vis import Tracks, Tubes
from pyvseg.video.png import MAX_PIXELS
from pyvseg.video.rle import decode_runs


@dataclass(frozen=True)
class Video:
    """A video and what is known of its tracks, as the JSON has it."""

    id: int | str
    name: str  # folder of its images
    size: tuple[int, int]  # height, width
    length: int
    annotations: list[dict] = field(default_factory=list)
    results: list[dict] = field(default_factory=list)


class VISTracks:
    """One annotation file and one or several files of results. Raises PyvsegError that names the file and what is wrong.

    Results name a video by its id or, as `pyvseg run` on a single video does, by the folder of its images.
    """

    def __init__(self, annotations: str | Path, results: Iterable[str | Path]) -> None:
        """annotations: the JSON, or a folder with a single JSON in it or in its `annotations`."""
        self.path = annotation_file(Path(annotations))
        self.categories, videos = _read(self.path, _annotations)
        self.videos = {video.name: video for video in videos}
        self._by_id = {video.id: video for video in videos}
        for path in results:
            for entry in _read(Path(path), _results):
                self._of(entry, path).results.append(entry)

    def truth(self, video: Video) -> Tracks:
        return _tracks(f"{self.path}: {video.name}", video, video.annotations, stated_areas=True)

    def result(self, video: Video) -> Tracks:
        return _tracks(f"results of {video.name}", video, video.results)

    def _of(self, entry: dict, path: str | Path) -> Video:
        key, category = entry["video_id"], entry["category_id"]
        video = self._by_id.get(key) or self.videos.get(key)
        if video is None:
            raise PyvsegError(f"{path}: video {key!r} is none of the {len(self.videos)} of {self.path.name}")
        if category not in self.categories:
            raise PyvsegError(
                f"{path}: category {category!r} is none of the {len(self.categories)} of {self.path.name}; results need its ids, from a model of its classes"
            )
        return video


def _read(path: Path, parse):
    try:
        return parse(json.loads(path.read_bytes()))
    except OSError as error:
        raise PyvsegError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise PyvsegError(f"{path}: not in the form of YouTube-VIS ({type(error).__name__}: {error})") from None


def _annotations(document: dict) -> tuple[dict[int, str], list[Video]]:
    if "annotations" not in document:
        raise ValueError("there are no annotations; those of test sets are not public")
    folders = [Path(video["file_names"][0]).parent.name for video in document["videos"]]
    several = {name for name, count in Counter(folders).items() if count > 1 or not name}
    videos = {}
    for video, folder in zip(document["videos"], folders):
        key, size = video["id"], (int(video["height"]), int(video["width"]))
        if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"video {key} is {size[1]}x{size[0]}; images have at most {MAX_PIXELS} pixels")
        videos[key] = Video(key, f"video_{key}" if folder in several else folder, size, len(video["file_names"]))
    categories = {int(each["id"]): str(each["name"]) for each in document["categories"]}
    for entry in document["annotations"]:
        if entry["category_id"] not in categories:
            raise ValueError(f"a track of video {entry['video_id']} has category {entry['category_id']}, which is none of the {len(categories)}")
        areas = [float(area or 0) for area in entry.get("areas") or ()]
        if not all(map(math.isfinite, areas)):
            raise ValueError(f"an area in video {entry['video_id']} is not a number")
        videos[entry["video_id"]].annotations.append(_checked({"score": 0, **entry, "areas": areas}))
    return categories, [videos[key] for key in sorted(videos)]


def _results(document: list[dict]) -> list[dict]:
    if not isinstance(document, list):
        raise TypeError("results are a list of tracks")
    return list(map(_checked, document))


def _checked(track: dict) -> dict:
    if not isinstance(track["video_id"], (int, str)) or not isinstance(track["category_id"], int) or not isinstance(track["segmentations"], list):
        raise TypeError("a track needs a video_id, a category_id and a list of segmentations")
    if not math.isfinite(track["score"]):
        raise ValueError(f"a track of video {track['video_id']} has the score {track['score']}")
    return track


def _tracks(name: str, video: Video, entries: list[dict], stated_areas: bool = False) -> Tracks:
    for entry in entries:
        for part in ("segmentations", "areas") if stated_areas and entry["areas"] else ("segmentations",):
            if len(entry[part]) != video.length:
                raise PyvsegError(f"{name}: a track has {part} for {len(entry[part])} frames, but the video has {video.length}")
    masks = [(track, frame, mask) for track, entry in enumerate(entries) for frame, mask in enumerate(entry["segmentations"]) if mask]
    tubes, areas = tubes_of(name, video, len(entries), masks)
    if stated_areas:
        for row, entry in zip(areas, entries):
            row[:] = entry["areas"] or row
    shown = (areas > 0).sum(1)
    return Tracks(
        np.array([entry["category_id"] for entry in entries], np.int64),
        np.array([entry["score"] for entry in entries], float),
        np.array([bool(entry.get("iscrowd", 0)) for entry in entries], bool),
        areas.sum(1) / np.maximum(shown, 1),
        tubes,
    )


def tubes_of(name: str, video: Video, tracks: int, masks: list[tuple[int, int, dict | list]]) -> tuple[Tubes, np.ndarray]:
    """And the areas (tracks, frames) of the masks."""
    pixels = video.size[0] * video.size[1]
    runs, lengths = decode_runs([_rle(name, mask, video.size) for _, _, mask in masks], video.size, name)
    track, frame = (np.array([mask[i] for mask in masks], np.int64) for i in (0, 1))
    owner = np.repeat(np.arange(len(masks)), lengths)
    place = np.arange(len(runs)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    kept = (place % 2 == 1) & (runs > 0)
    owner, stops = owner[kept], np.cumsum(runs)[kept]
    stops += (frame[owner] - owner) * pixels  # every mask before has added `pixels`
    areas = np.zeros((tracks, video.length))
    areas[track, frame] = np.bincount(owner, runs[kept], len(masks))
    first = np.concatenate(([0], np.cumsum(np.bincount(track[owner], minlength=tracks))))
    return Tubes(stops - runs[kept], stops, first.astype(np.int64)), areas


def _rle(name: str, mask: dict | list, size: tuple[int, int]) -> dict:
    """Polygons are filled as COCO does."""
    if isinstance(mask, dict):
        return mask
    from pycocotools import mask as coco

    try:
        polygons = [np.array(polygon, float) for polygon in mask]
        bound = 2 * max(size)
        if not all(polygon.ndim == 1 and polygon.size >= 6 and polygon.size % 2 == 0 and (np.abs(polygon) <= bound).all() for polygon in polygons):
            raise ValueError
    except (ValueError, TypeError):
        raise PyvsegError(f"{name}: a mask is neither COCO RLE nor polygons within the image") from None
    return {"size": size, "counts": coco.merge(coco.frPyObjects([polygon.tolist() for polygon in polygons], *size))["counts"]}
