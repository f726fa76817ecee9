# SPDX-License-Identifier: Apache-2.0
"""Panoptic videos in the COCO form: a JSON file that lists the segments of every frame, and a PNG of their ids per frame.

    {"videos":      [{"video_id": NAME, "images": [{"file_name": "00000.png", ...}, ...]}, ...],             annotations only
     "categories":  [{"id": 0, "name": "wall", "isthing": 0}, ...],                                          optional in results
     "annotations": [{"video_id": NAME, "annotations": [
                         {"file_name": "00000.png", "segments_info": [
                             {"id": 1, "category_id": 0, "iscrowd": 0, "area": 123}, ...]}, ...]}, ...]}     results: id and category_id

    MAPS/NAME/00000.png    id of each pixel, R + 256 G + 65536 B, 0 = void; see `pyvseg.video.panoptic`

An id stands for one object (or region of stuff) over its whole video. Annotations and results of VIPSeg have this form.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyvseg.errors import PyvsegError
from pyvseg.metrics.panoptic import Segments


class Category(NamedTuple):
    name: str
    is_thing: bool


class PanopticVideos:
    """The videos of one JSON file. Raises PyvsegError where the file is missing or not of this form."""

    def __init__(self, lists: str | Path, maps: str | Path) -> None:
        """lists: the JSON file. maps: the folder that holds a folder of PNGs per video."""
        self.lists, self.folder = Path(lists), Path(maps)
        try:
            content = json.loads(self.lists.read_bytes())
        except OSError as error:
            raise PyvsegError(f"{lists}: cannot be read ({error.strerror}); panoptic videos need it beside their PNGs") from None
        except ValueError as error:
            raise PyvsegError(f"{lists}: damaged JSON ({error}); write it again") from None
        try:
            self.categories = {int(each["id"]): Category(str(each["name"]), bool(each["isthing"])) for each in content.get("categories", ())}
            self._videos = {str(each["video_id"]): _frames(each["annotations"]) for each in content["annotations"]}
            named = {str(each["video_id"]): [_stem(image) for image in each["images"]] for each in content.get("videos", ())}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PyvsegError(f"{lists}: not in the form of panoptic videos ({type(error).__name__}: {error}); see pyvseg.datasets.coco_panoptic") from None
        for name, stems in named.items():
            if stems != list(self._videos.get(name, stems)):
                raise PyvsegError(f'{lists}: the frames of video {name} differ between "videos" and "annotations"; make the file again')

    def videos(self) -> list[str]:
        """Names, in the order of the file."""
        return list(self._videos)

    def segments(self, video: str) -> dict[str, Segments]:
        """What each frame lists, by stem, in order."""
        if video not in self._videos:
            raise PyvsegError(f"{self.lists}: no video {video!r} among its {len(self._videos)}")
        return self._videos[video]

    def maps(self, video: str) -> dict[str, Path]:
        """The PNG of each frame, by stem, in order."""
        return {stem: self.folder / video / f"{stem}.png" for stem in self.segments(video)}


def _stem(frame: dict) -> str:
    return Path(frame["file_name"]).stem


def _frames(frames: list[dict]) -> dict[str, Segments]:
    listed = {_stem(frame): _segments(frame["segments_info"]) for frame in frames}
    if len(listed) < len(frames):
        raise ValueError("a frame is listed twice")
    return listed


def _segments(infos: list[dict]) -> Segments:
    """A segment without an area is counted later, one without iscrowd is none."""
    rows = [(info["id"], info["category_id"], info.get("iscrowd", 0), info.get("area", -1)) for info in infos]
    return Segments.of(*np.array(rows, np.int64).reshape(-1, 4).T)
