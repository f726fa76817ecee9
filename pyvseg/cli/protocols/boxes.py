# SPDX-License-Identifier: Apache-2.0
"""ImageNet VID: AP of boxes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from pyvseg.datasets.youtube_vis import annotation_file
from pyvseg.errors import PyvsegError
from pyvseg.metrics import vod

if TYPE_CHECKING:
    from pyvseg.cli.eval import Eval


def evaluate(options: Eval) -> tuple[dict, list[str]]:
    if options.image_set is not None:
        raise PyvsegError(f"--image-set {options.image_set}: this protocol has none; give --gt the JSON of the split")
    path = annotation_file(options.gt)
    truth, names = _read(path, _annotations)
    found = [entry for file in _files(options.results) for entry in _read(file, _results)]
    images = {image["id"] for image in truth["images"]}
    if unknown := [entry["image_id"] for entry in found if entry["image_id"] not in images]:
        raise PyvsegError(f"{options.results}: image {unknown[0]!r} is none of the {len(images)} of {path.name}; results need its ids, from a run on this JSON")
    left_out = _choose(truth, names, options.sequences, path)
    images = {image["id"] for image in truth["images"]}
    found = [entry for entry in found if entry["image_id"] in images]
    if not truth["annotations"]:
        raise PyvsegError(f"{path}: no object is annotated in these {len(truth['images'])} images, so there is nothing to score")
    totals, each = vod.average_precision(truth, found)
    categories = {category["id"]: category["name"] for category in truth["categories"]}
    table = {"totals": totals, "categories": {categories[key]: numbers for key, numbers in each.items()}, "left_out": left_out}
    table["images_without_results"] = len(images - {entry["image_id"] for entry in found})
    return table, _lines(table, len(images))


def _choose(truth: dict, names: dict, sequences: tuple[str, ...], path: Path) -> list[str]:
    """Leaves in `truth` only what belongs to these videos; returns the names of the others."""
    if unknown := [name for name in sequences if name not in names.values()]:
        raise PyvsegError(f"{path}: no video {unknown[0]!r} among its {len(names)}")
    if not sequences:
        return []
    chosen = {key for key, name in names.items() if name in sequences}
    truth["images"] = [image for image in truth["images"] if image.get("video_id") in chosen]
    kept = {image["id"] for image in truth["images"]}
    truth["annotations"] = [entry for entry in truth["annotations"] if entry["image_id"] in kept]
    return [name for key, name in names.items() if key not in chosen]


def _files(results: Path) -> list[Path]:
    """The file itself, that of one run, or those of many runs."""
    if results.is_file():
        return [results]
    one = results / "results.json"
    found = [one] if one.is_file() else sorted(results.glob("*/results.json"))
    if not found:
        raise PyvsegError(f"{results}: neither a JSON of boxes nor a folder with results.json, or with folders that have one")
    return found


def _read(path: Path, parse):
    try:
        return parse(json.loads(path.read_bytes()))
    except OSError as error:
        raise PyvsegError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise PyvsegError(f"{path}: not in the form of COCO ({type(error).__name__}: {error})") from None


def _annotations(document: dict) -> tuple[dict, dict]:
    """What COCO's program needs of it, and the names of the videos."""
    ids, categories = {image["id"] for image in document["images"]}, {int(category["id"]) for category in document["categories"]}
    for number, entry in enumerate(document["annotations"], 1):
        if entry["image_id"] not in ids or entry["category_id"] not in categories:
            raise ValueError(f"annotation {number} has an image or a category that is not listed")
        width, height = _box(entry)[2:]
        entry |= {"id": number, "iscrowd": int(entry.get("iscrowd", 0)), "area": float(entry.get("area", width * height))}
    return document, {video["id"]: str(video["name"]) for video in document.get("videos", [])}


def _results(document: list[dict]) -> list[dict]:
    if not isinstance(document, list):
        raise TypeError("results are a list of boxes")
    keys = "image_id", "category_id", "bbox", "score"
    found = [{key: entry[key] for key in keys} for entry in document]
    if not all(isinstance(entry["image_id"], (int, str)) and math.isfinite(entry["score"]) and _box(entry) for entry in found):
        raise ValueError("an image_id or a score is not what it should be")
    return found


def _box(entry: dict) -> list[float]:
    box = [float(value) for value in entry["bbox"]]
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError(f"a box of image {entry['image_id']} is not x, y, width, height")
    return box


def _lines(table: dict, images: int) -> list[str]:
    width = max(len("category"), *map(len, table["categories"])) + 2
    columns = ("AP50", "AP", "AP75")
    lines = [f"{'category':<{width}}" + "".join(f"{column:>8}" for column in columns)]
    for name, numbers in {**table["categories"], "total": table["totals"]}.items():
        lines.append(f"{name:<{width}}" + "".join(f"{100 * numbers[column]:>8.1f}" for column in columns))
    if missing := table["images_without_results"]:
        lines.append(f"{missing} of {images} images have no results, so all their objects count as missed")
    return lines
