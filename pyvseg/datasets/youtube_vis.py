# SPDX-License-Identifier: Apache-2.0
"""YouTube-VIS 2019, 2021, 2022 and OVIS, and every file laid out like theirs: which frames make a video, which ids its results need."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pyvseg.errors import PyvsegError


@dataclass(frozen=True)
class VISVideo:
    """One video: its id in the data set, a name for files, its images in order, the size (height, width) that results have, and the ids
    of its images, where they have any."""

    id: int | str
    name: str
    files: list[Path]
    size: tuple[int, int]
    frame_ids: tuple[int, ...] | None = None


class YouTubeVIS:
    """The videos and categories of one split's annotation file; annotations themselves are not needed.

    Raises PyvsegError where the file or the images are not there or not as the data sets have them.
    """

    def __init__(self, path: str | Path) -> None:
        """path: the JSON, or a folder with a single JSON in it or in its `annotations`."""
        self.path = path = annotation_file(Path(path))
        try:
            document = json.loads(path.read_bytes())
            names = {int(c["id"]): str(c["name"]) for c in document["categories"]}
            videos = [(v["id"], v["file_names"], (int(v["height"]), int(v["width"]))) for v in document["videos"]]
            if not videos or not all(files and all(isinstance(f, str) for f in files) for _, files, _ in videos):
                raise ValueError("there are videos without file_names, or none at all")
        except OSError as error:
            raise PyvsegError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PyvsegError(f"{path}: not a YouTube-VIS annotation file ({type(error).__name__}: {error}); give the JSON of one split") from None
        if any(Path(f).is_absolute() or ".." in Path(f).parts for _, files, _ in videos for f in files):
            raise PyvsegError(f"{path}: has file names that lead out of the image folder; they must be like VIDEO/00000.jpg")
        self.categories = names
        images = _image_folder(path, videos[0][1][0])
        folders = [Path(files[0]).parent.name for _, files, _ in videos]
        several = {name for name, count in Counter(folders).items() if count > 1 or not name}
        self.videos = [
            VISVideo(key, f"video_{key}" if folder in several else folder, [images / f for f in files], size)
            for (key, files, size), folder in zip(videos, folders, strict=True)
        ]

    def category_ids(self, classes: tuple[str, ...], model: str) -> tuple[int | None, ...]:
        """The category id of each class of a model, by name; None where the data set has no such category."""
        return match_categories(self.path, self.categories, classes, model)


def match_categories(path: Path, categories: dict[int, str], classes: tuple[str, ...], model: str) -> tuple[int | None, ...]:
    """The id of each class of a model among the categories of a data set. Raises PyvsegError for categories that the model does not know."""
    ids = {_plain(name): key for key, name in categories.items()}
    found = tuple(ids.get(_plain(name)) for name in classes)
    missing = [name for name in categories.values() if _plain(name) not in set(map(_plain, classes))]
    if missing:
        raise PyvsegError(
            f"{path}: {model} does not know {len(missing)} of its {len(categories)} categories ({', '.join(missing[:3])}, ...); "
            "take a model that was trained on this data set (`pyvseg models`)"
        )
    return found


def find_document(folder: Path) -> list[Path]:
    """JSON files that may describe the videos of a folder."""
    found = sorted(folder.glob("*.json")) or sorted((folder / "annotations").glob("*.json"))
    return [path for path in found if path.name != "meta.json"]  # that is YouTube-VOS


def annotation_file(path: Path) -> Path:
    """The JSON itself, or the only one in a folder or its `annotations`. Raises PyvsegError."""
    if path.suffix == ".json":
        return path
    found = find_document(path)
    if len(found) != 1:
        what = f"several JSON files ({', '.join(p.name for p in found[:4])}); give the one to use itself" if found else "no annotation file (JSON)"
        raise PyvsegError(f"{path}: {what}")
    return found[0]


def _image_folder(document: Path, first: str) -> Path:
    """Where the file names begin: the data sets keep their images beside the JSON, in JPEGImages, in a folder named after the
    split, or one floor up."""
    parents = [document.parent, document.parent.parent]
    splits = [document.stem, document.stem.removeprefix("annotations_").removeprefix("instances_")]
    tried = [parent / split / part for parent in parents for split in ("", *splits) for part in ("", "JPEGImages")]
    for folder in tried:
        if (folder / first).is_file():
            return folder
    raise PyvsegError(f"{document}: its images are not there: no {first} beside it, in JPEGImages or in {splits[0]}/JPEGImages")


def _plain(name: str) -> str:
    return name.casefold().replace(" ", "_")
