# SPDX-License-Identifier: Apache-2.0
"""A video's state as files: what its later frames and its result depend on, saved and read back bit for bit. No pickles."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyvseg import checkpoints
from pyvseg.errors import CheckpointError
from pyvseg.layers.kmax_decoder import FramePixels, LayerPixels
from pyvseg.layers.pixel_decoder import PixelFeatures
from pyvseg.models.ctvis import CTVISState
from pyvseg.models.ctvis_tracker import Record, Tracklet, TrackerState
from pyvseg.models.frame_size import FloatFrameSize, FrameSize
from pyvseg.models.genvis import GenVISState, Prototypes
from pyvseg.models.kmax_size import KMaXSize
from pyvseg.models.mask2former_video import ClipState
from pyvseg.models.minvis import MinVISState
from pyvseg.models.panoptic_frames import FramesState
from pyvseg.models.panoptic_linking import LinkState, Remembered
from pyvseg.models.polyphonicformer import PolyphonicFormerState
from pyvseg.models.quasi_dense import QuasiDenseState, Track
from pyvseg.models.spool import MaskStore, Spool
from pyvseg.models.tube_link_instances import TubeLinkInstancesState
from pyvseg.models.tube_link_maps import TubeMapsState
from pyvseg.models.tube_link_tracker import TubeTrack, TubeTracks
from pyvseg.models.video_detector import DetectionState
from pyvseg.models.video_kmax import VideoKMaXState
from pyvseg.models.video_knet import VideoKNetState
from pyvseg.models.video_knet_instances import VideoKNetClip
from pyvseg.models.vita import VITAState

_KINDS = {
    kind.__name__: kind
    for kind in (
        CTVISState, ClipState, DetectionState, FloatFrameSize, FramePixels, FrameSize, FramesState, GenVISState, KMaXSize, LayerPixels, LinkState, MaskStore, MinVISState, PixelFeatures,
        Prototypes, Record, Remembered, Tracklet, TrackerState, TubeLinkInstancesState, TubeMapsState, TubeTrack, TubeTracks, VITAState, VideoKMaXState,
        PolyphonicFormerState, QuasiDenseState, Track, VideoKNetClip, VideoKNetState,
    )
}  # fmt: skip


def save_state(state: Any, path: Path) -> None:
    """Writes `path`, a safetensors file with the state's structure in its header, and `path`.N for each of its spools."""
    tensors: list[Tensor] = []
    spools: list[Spool] = []
    document = _pack(state, tensors, spools)
    for n, spool in enumerate(spools):
        spool.save(_spool_path(path, n))
    checkpoints.write(path, {str(n): t for n, t in enumerate(tensors)}, {"format": "pyvseg-state", "state": json.dumps(document)})


def load_state(path: Path, device: torch.device | str = "cpu") -> Any:
    """Raises CheckpointError for files that `save_state` did not write."""
    tensors = checkpoints.read(path)
    try:
        document = json.loads(checkpoints.read_metadata(path)["state"])
        return _unpack(document, {k: t.to(device) for k, t in tensors.items()}, path)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise CheckpointError(f"{path}: not a saved state of a video, or damaged ({error}); start the video again") from None


def _spool_path(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _pack(value: Any, tensors: list[Tensor], spools: list[Spool]) -> Any:
    def pack(item: Any) -> Any:
        return _pack(item, tensors, spools)

    match value:
        case Tensor():
            tensors.append(value)
            return {"tensor": len(tensors) - 1}
        case Spool():
            spools.append(value)
            return {"spool": len(spools) - 1}
        case np.ndarray():
            tensors.append(torch.from_numpy(value))
            return {"array": len(tensors) - 1}
        case PixelFeatures() | FramePixels() | LayerPixels():
            return {"kind": type(value).__name__, "fields": {name: pack(item) for name, item in value._asdict().items()}}
        case dict():
            return {"dict": [[key, pack(item)] for key, item in value.items()]}
        case tuple():
            return {"tuple": [pack(item) for item in value]}
        case list():
            return [pack(item) for item in value]
        case _ if is_dataclass(value):
            return {"kind": type(value).__name__, "fields": {f.name: pack(getattr(value, f.name)) for f in fields(value)}}
    return value


def _unpack(document: Any, tensors: dict[str, Tensor], path: Path) -> Any:
    def unpack(item: Any) -> Any:
        return _unpack(item, tensors, path)

    match document:
        case {"tensor": n}:
            return tensors[str(n)]
        case {"array": n}:
            return tensors[str(n)].cpu().numpy()
        case {"spool": n}:
            return Spool.load(_spool_path(path, n))
        case {"kind": name, "fields": items}:
            return _KINDS[name](**{key: unpack(item) for key, item in items.items()})
        case {"dict": items}:
            return {key: unpack(item) for key, item in items}
        case {"tuple": items}:
            return tuple(map(unpack, items))
        case list():
            return list(map(unpack, document))
    return document
