# SPDX-License-Identifier: Apache-2.0
"""What lies in a results folder: its videos, their files, and what the page says of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av

from pyvseg.engine.output import UNFINISHED
from pyvseg.errors import VideoError
from pyvseg.video.palette import PALETTE
from pyvseg.video.panoptic_writer import segment_colour

SEEN = 0.3  # score of a box that counts
BUCKETS = 48  # cells of the bar that shows when an object is there


@dataclass(frozen=True)
class Entry:
    """The files of one video; what was not written is None."""

    name: str
    tracks: Path | None = None  # JSON list of objects with COCO RLE, or of boxes, or the segments of each frame
    overlay: Path | None = None
    masks: Path | None = None  # folder of PNGs
    error: str | None = None  # why there are no results
    classes: Path | None = None  # pred.json, whose first line names the classes of segments

    @property
    def strip(self) -> Path | None:
        """Where the thumbnails belong: beside the JSON, else beside the overlay or the masks."""
        beside = self.tracks or self.overlay or self.masks
        return beside and beside.with_name(f"{beside.stem}.jpg")


@dataclass
class Object:
    """One object of a video."""

    object_id: int
    category: str
    score: float
    colour: str  # in the overlay, #rrggbb
    frames: int  # in which it has a mask, or a box
    present: str  # "0110...": of each of at most BUCKETS equal parts of the video, whether it is there


@dataclass
class Facts:
    """What the page tells of a video."""

    frames: int = 0
    size: tuple[int, int] | None = None  # height, width
    fps: float | None = None
    objects: list[Object] = field(default_factory=list)


def find(root: Path) -> list[Entry]:
    """The videos of a results folder, by name: of one video, of a dataset, or with one folder for each video.

    Raises VideoError when there is none.
    """
    if not root.is_dir():
        raise VideoError(f"{root}: no such folder; give the --out folder of a run")
    entries = {entry.name: entry for entry in _dataset(root)}
    if not entries and (whole := _entry(root.resolve().name, root)) is not None:
        return [whole]
    entries = entries or {entry.name: entry for entry in (*_failed(root), *_folders(root))}
    if not entries:
        if (root / UNFINISHED).is_dir():
            raise VideoError(f"{root}: no video is finished yet; look again when one is")
        raise VideoError(f"{root}: no results in this folder; give the --out folder of a run")
    return [entries[name] for name in sorted(entries)]


def _entry(name: str, folder: Path) -> Entry | None:
    tracks = next((path for path in (folder / "results.json", folder / "masks.json", folder / "segments.json") if path.is_file()), None)
    overlay, masks = folder / "overlay.mp4", folder / "masks"
    entry = Entry(name, tracks, overlay if overlay.is_file() else None, masks if masks.is_dir() else None, classes=folder / "pred.json")
    return entry if entry.strip else None


def _folders(root: Path) -> Iterator[Entry]:
    for folder in root.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name != UNFINISHED and (entry := _entry(folder.name, folder)):
            yield entry


def _dataset(root: Path) -> Iterator[Entry]:
    """Folders for each kind of file, with one file or folder in them for each video."""
    tracks = {path.stem: path for kind in ("rle", "tracks", "segments", "boxes") for path in (root / kind).glob("*.json")}
    overlays = {path.stem: path for path in (root / "overlays").glob("*.mp4")}
    if len(tracks) == 1 and (root / "overlay.mp4").is_file():  # one video in the layout of panoptic data sets
        overlays = dict.fromkeys(tracks, root / "overlay.mp4")
    for name in {**tracks, **overlays}:
        masks = next((path for path in (root / "Annotations" / name, root / "masks" / name) if path.is_dir()), None)
        yield Entry(name, tracks.get(name), overlays.get(name), masks, classes=root / "pred.json")


def _failed(root: Path) -> Iterator[Entry]:
    """Videos that the manifest of a batch notes as failed; results found in the folder take their place."""
    try:
        lines = [line for path in root.glob("manifest*.jsonl") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return
    for line in lines:
        try:
            note = json.loads(line)
            if note.get("status") == "failed":
                yield Entry(str(note["name"]), error=str(note["reason"]))
        except (ValueError, AttributeError, KeyError):
            continue


def facts(entry: Entry) -> Facts:
    """Reads what was written of the video; damaged files say nothing."""
    found = Facts()
    if entry.masks is not None and entry.tracks is None:
        found.frames = sum(1 for _ in entry.masks.glob("*.png"))
    if entry.tracks is not None and (entry.tracks.name == "segments.json" or entry.tracks.parent.name == "segments"):
        _read_segments(entry, found)
    else:
        _read_objects(entry, found)
    if entry.overlay is not None:
        _read_overlay(entry.overlay, found)
    return found


def _read_objects(entry: Entry, found: Facts) -> None:
    given = entry.tracks is not None and (entry.tracks.name == "masks.json" or entry.tracks.parent.name == "rle")  # not found by a model
    entries = _read_entries(entry.tracks)
    if entries and "bbox" in entries[0]:
        found.objects = _of_boxes(entries)
        return
    for track in entries:
        segments = track["segmentations"]
        found.frames = max(found.frames, len(segments))
        found.size = found.size or next((tuple(rle["size"]) for rle in segments if rle), None)
        found.objects.append(_object(track, segments, "object" if given else f"class {track.get('category_id', 1)}"))
    _colour(found.objects, by_id=given)


def _of_boxes(entries: list[dict]) -> list[Object]:
    """Boxes do not say which belong together: one line for each class that is seen somewhere, with the best of its scores."""
    frames = {name: t for t, name in enumerate(dict.fromkeys(entry["image_id"] for entry in entries))}
    classes: dict[int, tuple[dict, list[bool]]] = {}
    for entry in sorted((e for e in entries if e["score"] >= SEEN), key=lambda e: -e["score"]):
        number = entry["category_id"]
        classes.setdefault(number, (entry, [False] * len(frames)))[1][frames[entry["image_id"]]] = True
    objects = []
    for number, (entry, present) in classes.items():
        objects.append(_object({"object_id": number, **entry}, present, f"class {number}"))
        objects[-1].colour = _hex(1 + (number - 1) % 255)
    return objects


def _read_segments(entry: Entry, found: Facts) -> None:
    """Panoptic results: the segments of each frame by their values."""
    there: dict[int, tuple[dict, list[bool]]] = {}
    try:
        names = _class_names(entry.classes)
        frames = json.loads(entry.tracks.read_bytes())["annotations"]
        for t, frame in enumerate(frames):
            for segment in frame["segments_info"]:
                there.setdefault(int(segment["id"]), (segment, [False] * len(frames)))[1][t] = True
        for value, (segment, present) in sorted(there.items()):
            category = int(segment["category_id"])
            each = _object({"object_id": value, "category": names.get(category)}, present, f"class {category}")
            each.colour = _hex(segment_colour(value, category, bool(segment["isthing"])))
            found.objects.append(each)
        found.frames = len(frames)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        found.objects = []


def _class_names(path: Path) -> dict[int, str]:
    try:
        with open(path, encoding="utf-8") as file:
            return {each["id"]: each["name"] for each in json.loads(file.readline().rstrip().rstrip(",") + "}")["categories"]}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _read_entries(path: Path | None) -> list[dict]:
    """Tracks, or boxes."""
    try:
        entries = json.loads(path.read_bytes()) if path else []
        if entries and "bbox" in entries[0]:
            return [{**e, "category_id": int(e["category_id"]), "score": float(e["score"]), "image_id": str(e["image_id"])} for e in entries]
        return [e for e in entries if isinstance(e["segmentations"], list) and isinstance(e.get("score", 1.0), (int, float))]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def _object(track: dict, segments: list, nameless: str) -> Object:
    cells = min(BUCKETS, len(segments))
    bounds = [round(i * len(segments) / cells) for i in range(cells + 1)] if cells else []
    present = "".join("01"[any(segments[a:b])] for a, b in zip(bounds, bounds[1:]))
    category = str(track.get("category") or nameless)
    return Object(int(track.get("object_id", 0)), category, float(track.get("score", 1.0)), "", sum(map(bool, segments)), present)


def _colour(objects: list[Object], by_id: bool) -> None:
    """A label image numbers given objects by their ids, found ones in the order of their first track."""
    numbers: dict[int, int] = {}
    for each in objects:
        number = each.object_id if by_id else numbers.setdefault(each.object_id, len(numbers) + 1)
        each.colour = _hex(number % 256)


def _hex(colour: int) -> str:
    return "#" + bytes(PALETTE[colour]).hex()


def _read_overlay(path: Path, found: Facts) -> None:
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            found.fps = float(stream.average_rate) if stream.average_rate else None
            found.frames = found.frames or stream.frames
            found.size = found.size or (stream.height, stream.width)
    except (av.FFmpegError, OSError, IndexError):
        pass
