# SPDX-License-Identifier: Apache-2.0
"""Masks in: what the user knows about the objects, as label images by frame.

A mask may be
- a palette or 8-bit grey PNG: the pixel is the object id, 1..254; 0 is background, 255 is void and says nothing;
  a PNG whose only values are 0 and 255 is a binary mask of object 1;
- several binary PNGs (a list, or a folder), one per object, ids in the order of their names;
- a folder of label PNGs called like frames of the video: masks at several frames;
- a JSON file with COCO RLE, polygons or boxes (see `read_json`);
- an array (first frame), or a dict of frame index or frame name -> array or label PNG.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from pyvseg.errors import VideoError
from pyvseg.video.png import read_labels
from pyvseg.video.reader import Video
from pyvseg.video.rle import decode_rle
from pyvseg.video.types import Frame

MAX_OBJECTS = 254  # a label image has 256 values; 0 is background, 255 is void
VOID = 255


def read_masks(source, video: Video) -> dict[int, np.ndarray]:
    """Reads masks from any of the forms above.

    Returns {frame index: uint8 (H, W) labels}, ascending, each of the video's size and with at least one object.
    Raises VideoError for files that cannot be read, masks of another size, empty masks, or more than 254 objects.
    """
    if isinstance(source, (str, Path)):
        masks = _read_path(Path(source), video)
    elif isinstance(source, Mapping):
        masks = dict(_read_item(key, item, video) for key, item in source.items())
    elif isinstance(source, Sequence) and source and all(isinstance(item, (str, Path)) for item in source):
        masks = _read_path(Path(source[0]), video) if len(source) == 1 else {0: _stack_binary([Path(p) for p in source], video)}
    else:
        masks = {0: _from_array(source, "mask")}
    if not masks:
        raise VideoError("no masks given; at least one frame needs a mask")
    return {index: check_mask(masks[index], video, index) for index in sorted(masks)}


def frames_with_masks(video: Video, masks: Mapping[int, np.ndarray]) -> Iterator[Frame]:
    """The video's frames, lazily, each with the mask given at it."""
    for frame in video:
        frame.mask = masks.get(frame.index)
        yield frame


def check_mask(labels: np.ndarray, video: Video, index: int, name: str = "") -> np.ndarray:
    """Turns void into "nothing said"; raises VideoError where the mask does not fit the video or holds no object."""
    name = name or f"the mask at frame {index}"
    count = video.frame_count
    if index < 0 or (count is not None and index >= count):
        raise VideoError(f"{name}: {video.source} has no such frame; its frames are 0 to {'?' if count is None else count - 1}")
    if labels.shape != video.size:
        (height, width), (video_height, video_width) = labels.shape, video.size
        raise VideoError(
            f"{name} is {width}x{height} but {video.source} is {video_width}x{video_height}; "
            "masks must have the video's size (resize the mask with nearest neighbour)"
        )
    labels = np.where(labels == VOID, 0, labels).astype(np.uint8)
    if not labels.any():
        raise VideoError(f"{name} is empty: no pixel belongs to an object; draw at least one object")
    return labels


def read_label_file(path: Path) -> np.ndarray:
    """A label PNG; one that holds only 0 and 255 is a binary mask and becomes object 1."""
    labels = read_labels(path)
    if np.array_equal(np.unique(labels), (0, VOID)):
        labels = (labels == VOID).astype(np.uint8)
    return labels


def _read_item(key: int | str, item, video: Video) -> tuple[int, np.ndarray]:
    if isinstance(key, str) and key not in (video.frame_names or ()):
        raise VideoError(f"{video.source}: there is a mask for frame {key} but no such frame")
    index = video.frame_names.index(key) if isinstance(key, str) else int(key)
    if isinstance(item, (str, Path)):
        return index, check_mask(read_label_file(Path(item)), video, index, f"mask {item}")
    return index, _from_array(item, f"mask at frame {key}")


def _read_path(path: Path, video: Video) -> dict[int, np.ndarray]:
    if path.is_dir():
        return _read_folder(path, video)
    if not path.exists():
        raise VideoError(f"mask {path}: no such file or folder")
    if path.suffix.lower() == ".json":
        return read_json(path, video)
    labels = read_label_file(path)
    return {0: check_mask(labels, video, 0, f"mask {path}")}


def _read_folder(folder: Path, video: Video) -> dict[int, np.ndarray]:
    files = sorted(path for path in folder.glob("*.png") if not path.name.startswith("."))
    if not files:
        raise VideoError(f"mask {folder}: no PNG in this folder")
    index_of = {name: index for index, name in enumerate(video.frame_names or ())}
    if video.frame_names is None:
        index_of = {path.stem: int(path.stem) for path in files if path.stem.isdigit() and len(path.stem) >= 5}
    if all(path.stem in index_of for path in files):
        return {index_of[path.stem]: check_mask(read_label_file(path), video, index_of[path.stem], f"mask {path}") for path in files}
    return {0: _stack_binary(files, video)}


def _stack_binary(files: list[Path], video: Video) -> np.ndarray:
    """One label image from binary masks, ids 1.. in the given order; where two overlap the later one lies on top."""
    if len(files) > MAX_OBJECTS:
        raise VideoError(f"{len(files)} masks given; at most {MAX_OBJECTS} objects fit into one video (ids 1 to {MAX_OBJECTS})")
    labels = np.zeros(video.size, np.uint8)
    for object_id, path in enumerate(files, 1):
        mask = read_labels(path)
        if len(np.unique(mask)) > 2:
            raise VideoError(f"mask {path} holds several labels; of one PNG per object each must be binary (or name them like frames of the video)")
        labels[check_mask((mask > 0).astype(np.uint8), video, 0, f"mask {path}") > 0] = object_id
    return labels


def _from_array(array, name: str) -> np.ndarray:
    labels = np.asarray(array)
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        raise VideoError(f"{name}: got {labels.dtype} {labels.shape}; a mask must be an integer (H, W) label image")
    if labels.size and (labels.min() < 0 or labels.max() > 255):
        raise VideoError(f"{name}: object ids go from {labels.min()} to {labels.max()}; at most {MAX_OBJECTS} objects, ids 1 to {MAX_OBJECTS}")
    return labels.astype(np.uint8)


def read_json(path: Path, video: Video) -> dict[int, np.ndarray]:
    """Masks from JSON, coordinates in pixels of the video, x to the right and y down from the top left corner.

    {"frame": 0, "width": 640, "height": 272,          (all three optional; frame counts from 0)
     "objects": [{"id": 1, "polygon": [[x, y], ...]},   (a filled outline)
                 {"id": 2, "box": [x, y, width, height]},
                 {"id": 3, "segmentation": {"size": [height, width], "counts": "..."}}]}   (COCO RLE, or COCO polygons)

    Several frames: {"frames": [{"frame": 0, "objects": [...]}, {"frame": 30, "objects": [...]}]}.
    A bare COCO RLE, or a list of them, gives objects 1, 2, ... of the first frame. Later objects lie on top.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise VideoError(f"cannot read mask {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise VideoError(f"mask {path} is not valid JSON") from None
    if isinstance(document, dict) and "counts" in document:
        document = [document]
    if isinstance(document, list):
        document = {"objects": [{"id": i, "segmentation": rle} for i, rle in enumerate(document, 1)]}
    entries = document.get("frames", [document]) if isinstance(document, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("objects"), list) and e["objects"] for e in entries):
        raise VideoError(f'mask {path}: labels are missing; expected {{"objects": [{{"id": 1, "polygon": [[x, y], ...]}}, ...]}}')
    masks = {}
    for entry in entries:
        index = entry.get("frame", 0)
        if not isinstance(index, int) or index < 0 or index in masks:
            raise VideoError(f"mask {path}: frame {index!r} is not a frame number, or is given twice")
        masks[index] = _draw_objects(entry, video, f"mask {path}, frame {index}")
    return masks


def _draw_objects(entry: dict, video: Video, name: str) -> np.ndarray:
    height, width = video.size
    if (entry.get("height", height), entry.get("width", width)) != (height, width):
        drawn = f"{entry.get('width')}x{entry.get('height')}"
        raise VideoError(f"{name} was drawn for {drawn} but {video.source} is {width}x{height}; masks must have the video's size")
    labels = np.zeros(video.size, np.uint8)
    for position, item in enumerate(entry["objects"], 1):
        object_id = item.get("id", position) if isinstance(item, dict) else None
        if not isinstance(object_id, int) or not 1 <= object_id <= MAX_OBJECTS:
            raise VideoError(f"{name}: object {position} has id {object_id!r}; ids must be 1 to {MAX_OBJECTS} (at most {MAX_OBJECTS} objects)")
        mask = _draw(item, video.size, f"{name}, object {object_id}")
        if not mask.any():
            raise VideoError(f"{name}, object {object_id} is empty: no pixel inside the {width}x{height} image")
        labels[mask] = object_id
    return labels


def _draw(item: dict, size: tuple[int, int], name: str) -> np.ndarray:
    """bool (H, W) of one object."""
    segmentation = item.get("segmentation")
    if isinstance(segmentation, dict):
        return decode_rle(segmentation, size, name)
    mask = np.zeros(size, np.uint8)
    try:
        if "box" in item:
            x, y, width, height = np.clip(np.asarray(item["box"], float), -1e6, 1e6)
            left, top, right, bottom = (max(0, round(v)) for v in (x, y, x + width, y + height))
            mask[top:bottom, left:right] = 1
        else:
            outlines = [item["polygon"]] if "polygon" in item else [np.asarray(flat, float).reshape(-1, 2) for flat in segmentation]
            points = [np.clip(np.asarray(outline, float), -1e6, 1e6).round().astype(np.int32) for outline in outlines]
            if any(p.ndim != 2 or p.shape[1] != 2 or len(p) < 3 for p in points):
                raise ValueError
            for outline in points:
                cv2.fillPoly(mask, [outline], 1)
    except (TypeError, ValueError, KeyError, cv2.error):
        shapes = '"polygon": [[x, y], ...] with 3 points or more, "box": [x, y, width, height] or a COCO "segmentation"'
        raise VideoError(f"{name}: expected {shapes}") from None
    return mask > 0
