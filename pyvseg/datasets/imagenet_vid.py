# SPDX-License-Identifier: Apache-2.0
"""ImageNet VID as COCO-style JSON (its usual conversion: `videos`, `images` with a `video_id` each, `categories`, `annotations`)."""

from __future__ import annotations

import json
from pathlib import Path

from pyvseg.datasets.youtube_vis import VISVideo, annotation_file, match_categories
from pyvseg.errors import PyvsegError

_FOLDERS = ("", "images", "Data/VID", "Data", "VID", "ILSVRC2015/Data/VID")  # beside the JSON or one floor up


class ImageNetVID:
    """The videos and categories of one split; annotations themselves are not needed.

    Raises PyvsegError where the file or the images are not there or not as usual.
    """

    def __init__(self, path: str | Path) -> None:
        """path: the JSON, or a folder with a single JSON in it or in its `annotations`."""
        self.path = path = annotation_file(Path(path))
        try:
            document = json.loads(path.read_bytes())
            self.categories = {int(c["id"]): str(c["name"]) for c in document["categories"]}
            names = {v["id"]: str(v["name"]) for v in document["videos"]}
            images: dict[int, list[tuple]] = {key: [] for key in names}
            for image in document["images"]:
                size = int(image["height"]), int(image["width"])
                images[image["video_id"]].append((int(image["id"]), str(image["file_name"]), size))
            if not any(images.values()):
                raise ValueError("there are no images of videos")
        except OSError as error:
            raise PyvsegError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PyvsegError(f"{path}: not ImageNet VID as COCO-style JSON ({type(error).__name__}: {error}); it needs videos, images and categories") from None
        files = [file for each in images.values() for _, file, _ in each]
        if any(Path(file).is_absolute() or ".." in Path(file).parts for file in files):
            raise PyvsegError(f"{path}: has file names that lead out of the image folder; they must be like VIDEO/000000.JPEG")
        folder = _image_folder(path, files[0])
        self.videos = [self._video(key, names[key], sorted(each), folder) for key, each in images.items() if each]

    def _video(self, key: int | str, name: str, images: list[tuple], folder: Path) -> VISVideo:
        """Frames are in the order of their ids, which follow each other in a video."""
        ids, files, sizes = zip(*images)
        return VISVideo(key, name.replace("/", "_"), [folder / file for file in files], sizes[0], ids)

    def category_ids(self, classes: tuple[str, ...], model: str) -> tuple[int | None, ...]:
        """The category id of each class of a model, by name; None where the data set has no such category."""
        return match_categories(self.path, self.categories, classes, model)


def _image_folder(document: Path, first: str) -> Path:
    for parent in (document.parent, document.parent.parent):
        for folder in _FOLDERS:
            if (parent / folder / first).is_file():
                return parent / folder
    raise PyvsegError(f"{document}: its images are not there: no {first} beside it or one floor up, in Data/VID for instance")
