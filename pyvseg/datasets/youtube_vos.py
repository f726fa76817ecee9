# SPDX-License-Identifier: Apache-2.0
"""YouTube-VOS 2018 and 2019: objects enter at any frame, and `meta.json` says which frames must be answered."""

from __future__ import annotations

import json
from pathlib import Path

from pyvseg.errors import PyvsegError


class YouTubeVOS:
    """One split, the folder that holds meta.json, JPEGImages and Annotations (ROOT/valid, for instance).

    A mask of the valid and test splits stands only at frames where some object appears for the first time and holds only
    those objects; 0 in it means that nothing is said. Ids may have gaps and are kept in results.
    Raises PyvsegError, here and from every method, where something is not there or not as the dataset has it.
    """

    def __init__(self, root: str | Path, frames: str | Path | None = None) -> None:
        """frames: another folder of images, by video, such as the 30 fps ones of all_frames; by default ROOT/JPEGImages."""
        self.root = Path(root)
        self.images = Path(frames) if frames is not None else self.root / "JPEGImages"
        path = self.root / "meta.json"
        try:
            videos = json.loads(path.read_text())["videos"]
            self._objects = {name: {int(key): item for key, item in video["objects"].items()} for name, video in videos.items()}
            if any(not isinstance(item["frames"], list) for video in self._objects.values() for item in video.values()):
                raise TypeError("frames is no list")
        except OSError as error:
            raise PyvsegError(f"{path}: cannot be read ({error.strerror}); give the folder of one split, such as ROOT/valid") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PyvsegError(f"{path}: not the meta.json of YouTube-VOS ({type(error).__name__}: {error}); fetch it again") from None

    def videos(self) -> list[str]:
        """All videos, by name."""
        return sorted(self._objects)

    def objects(self, video: str) -> dict[int, str | None]:
        """Ids of a video's objects, ascending, with their category where the split tells it (train)."""
        return {key: item.get("category") for key, item in sorted(self._of(video).items())}

    def first_appearances(self, video: str) -> dict[int, str]:
        """Object id -> stem of the frame that gives its mask."""
        return {key: min(item["frames"]) for key, item in sorted(self._of(video).items()) if item["frames"]}

    def required_frames(self, video: str) -> list[str]:
        """Stems of the frames that a result must hold: the union over the video's objects."""
        return sorted({stem for item in self._of(video).values() for stem in item["frames"]})

    def frames(self, video: str) -> dict[str, Path]:
        """Images of a video by stem, in order."""
        self._of(video)
        return _files(self.images / video, (".jpg", ".jpeg", ".png"))

    def annotations(self, video: str) -> dict[str, Path]:
        """Label PNGs of a video by stem, in order."""
        self._of(video)
        return _files(self.root / "Annotations" / video, (".png",))

    def _of(self, video: str) -> dict[int, dict]:
        if video not in self._objects:
            raise PyvsegError(f"{self.root / 'meta.json'}: no video {video!r} among its {len(self._objects)}")
        return self._objects[video]


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    files = {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in suffixes}
    if not files:
        raise PyvsegError(f"{folder}: no {' or '.join(suffixes)} files there")
    return files
