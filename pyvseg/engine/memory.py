# SPDX-License-Identifier: Apache-2.0
"""How much memory the segmentation of a video will take, told before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from pyvseg.errors import VideoError
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.stcn import STCN
from pyvseg.models.video_instances import CHUNK_BYTES
from pyvseg.models.vos import Geometry
from pyvseg.video.reader import Video

QUEUE_BYTES = 256 << 20  # of decoded frames that wait between two stages
_NETWORK, _NETWORK_BASE = 950, 150 << 20  # bytes per pixel of a batch in float32, and of any batch; measured on ResNet-50 and Swin-L
_FEATURES = 250  # bytes per pixel that a joint model takes for every frame that it holds: kept maps, joined, and its keys
_PROGRAM, _CLIP = 800 << 20, 330  # panoptic: bytes of the program with its network, and per pixel for every frame of a clip; the most of any system
_FOLLOWING_BASE, _SHARE = 600 << 20, 0.8  # bytes of the program and of a few frames' inner maps; part of all memory to use
_DECODER_FRAMES = 16  # that FFmpeg's threads hold, at 1.5 bytes a pixel
_CHUNKS = 6  # arrays of the size of a chunk of full-size masks that exist at once
_GROUPS = {  # by controllers: where control groups are, and what says how much they may use, use, and use for files that can go
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
_sharers = 1


def queue_frames(video: Video, step: int) -> int:
    """Frames that may wait between two stages: two steps of the model, fewer where frames are huge."""
    height, width = video.size
    return max(2, min(2 * step, QUEUE_BYTES // (3 * height * width)))


def needed(network: nn.Module, video: Video, step: int, at_once: int = 1) -> tuple[int, int]:
    """Bytes on the model's device and in main memory for `at_once` such videos, `step` frames of each in a batch."""
    s, (height, width) = network.settings, video.size
    size = FrameSize.of(height, width, s.short_side, s.long_side)
    pixels = size.padded[0] * size.padded[1] * network.dtype.itemsize / 4
    frames = _FEATURES * pixels * _held_frames(network, video)
    batch = _NETWORK_BASE + at_once * _NETWORK * pixels * step
    masks = _CHUNKS * max(CHUNK_BYTES, 4 * height * width)  # not at the same time as a batch
    decoded = at_once * height * width * (3 * (queue_frames(video, step) + 2 * step) + 1.5 * _DECODER_FRAMES)
    return int(max(batch, masks) + at_once * frames), int(decoded)


def _held_frames(network: nn.Module, video: Video) -> int:
    """A joint model sees the whole video at once, or tubes of it."""
    return getattr(network.settings, "held_frames", video.frame_count or 0) if network.settings.joint else 0


def clip_bytes(network: STCN, video: Video, clip_length: int, objects: int, memory_frames: int) -> int:
    """Bytes that following `objects` through a video takes: features of the clip, its probabilities before and after they are
    resized, values read and remembered."""
    s, (height, width) = network.settings, video.size
    geometry = Geometry.of(height, width, s.short_side)
    pixels = (geometry.resized[0] + 15) * (geometry.resized[1] + 15)
    values = 4 * s.value_width / 256 * objects  # at stride 16
    frame = _feature_bytes(network) + 2 * 4 * (objects + 1) + 3 * values
    queued = 3 * height * width * 2 * queue_frames(video, clip_length)
    return int(_FOLLOWING_BASE + pixels * (clip_length * frame + memory_frames * values) + 4 * (objects + 2) * height * width + queued)


@lru_cache(maxsize=1)
@torch.inference_mode()
def _feature_bytes(network: STCN) -> float:
    """Of a frame's features, for each pixel of the network's input."""
    found = network.features(torch.zeros(1, 3, 64, 64, device=network.device))
    return sum(x.nbytes for x in vars(found).values() if x is not None) / 64**2


def fitting_clip(network: STCN, video: Video, clip_length: int, objects: int, memory_frames: int, at_once: int = 1) -> tuple[int, int]:
    """The clip length and the number of such videos at once for which the memory will do: rather one video at a time than shorter clips.

    It goes by all memory that the machine has, so that the same video gets the same clips in every run. Raises VideoError where not even
    single frames fit."""
    most = _usable(network.device)
    if at_once > 1 and at_once * (clip_bytes(network, video, clip_length, objects, memory_frames) - _FOLLOWING_BASE) + _FOLLOWING_BASE <= most:
        return clip_length, at_once
    for length in range(clip_length, 0, -1):
        if clip_bytes(network, video, length, objects, memory_frames) <= most:
            return length, 1
    height, width = video.size
    raise VideoError(
        f"{video.source}: {objects} objects in frames of {width}x{height} take {clip_bytes(network, video, 1, objects, memory_frames) / 1e9:.1f} GB of memory "
        f"({network.device}) even frame by frame, {most / 1e9:.1f} GB can be had; lower --max-memory-frames, or make the video smaller"
    )


def panoptic_bytes(network: nn.Module, video: Video, clip_length: int) -> int:
    """Bytes that a panoptic video takes: two frames pass through the network at a time, those of a clip are seen together."""
    height, width = video.size
    padded = network.new_state(height, width).size.padded
    pixels = padded[0] * padded[1] * network.dtype.itemsize / 4
    queued = 3 * height * width * 2 * queue_frames(video, max(2, clip_length))
    return int(_PROGRAM + pixels * (2 * _NETWORK + clip_length * _CLIP) + queued)


def fitting_panoptic(network: nn.Module, name: str, video: Video, clip_length: int) -> int:
    """The clip length, or the longest below it for which the memory will do; it goes by all memory, as `fitting_clip`. Raises VideoError
    where not even single frames fit."""
    most = _usable(network.device)
    for length in range(clip_length, 0, -1):
        if panoptic_bytes(network, video, length) <= most:
            return length
    height, width = video.size
    raise VideoError(
        f"{video.source}: frames of {width}x{height} take {name} {panoptic_bytes(network, video, 1) / 1e9:.1f} GB of memory ({network.device}), "
        f"{most / 1e9:.1f} GB can be had; try {'--precision bfloat16, ' if network.dtype == torch.float32 else ''}fewer --workers or a smaller video"
    )


def _usable(device: torch.device) -> float:
    return _SHARE * total(device) / _sharers


def share(processes: int) -> None:
    """Tells that so many processes like this one share the memory of the device."""
    global _sharers
    _sharers = processes


def total(device: torch.device) -> float:
    """Bytes of a device's memory; without bound where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    found = math.inf
    with suppress(OSError, ValueError, IndexError):
        found = 1024 * int(Path("/proc/meminfo").read_text().split()[1])
    return min([found, *(most for most, _ in _allowed())])


def available(device: torch.device) -> int | None:
    """Free bytes of a device's memory; None where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for tensors to come
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    return min([free, *(most - used for most, used in _allowed())])


def _allowed() -> Iterator[tuple[int, int]]:
    """Bytes that each control group of this process may use, and uses, without cached files: containers and SLURM set such bounds."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in _GROUPS:
                continue
            folder, most, used, cached = _GROUPS[controllers]
            for place in (Path(path), *Path(path).parents):
                with suppress(OSError, ValueError):  # "max": no bound
                    group = Path(f"{folder}{place}")
                    kept = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                    yield int((group / most).read_text()), int((group / used).read_text()) - int(kept.get(cached, 0))


def check_memory(network: nn.Module, name: str, video: Video, step: int, at_once: int = 1) -> None:
    """Raises VideoError, with what to lower, where the memory will not do."""
    on_device, in_main = needed(network, video, step, at_once)
    host = torch.device("cpu")
    wants = [(network.device, on_device), (host, in_main)] if network.device.type == "cuda" else [(host, on_device + in_main)]
    for device, bytes_ in wants:
        free = available(device)
        if free is not None and bytes_ > free:
            height, width = video.size
            whole = network.settings.joint and not hasattr(network.settings, "held_frames")
            what = f"{width}x{height} frames" if not whole else f"{video.frame_count} frames of {width}x{height}, seen together,"
            ways = ["--at-once 1"] if at_once > 1 else []
            ways += ["--precision bfloat16"] if network.dtype == torch.float32 else []
            ways += ["fewer --frames, or a model that goes frame by frame (minvis, ctvis)"] if whole else []
            raise VideoError(
                f"{video.source}: {what} take {name} about {bytes_ / 1e9:.1f} GB of memory ({device}), {free / 1e9:.1f} GB are free; "
                f"try {', '.join([*ways, 'a smaller video'])}"
            )
