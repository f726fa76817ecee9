# SPDX-License-Identifier: Apache-2.0
"""How much memory instance segmentation of a video will take, told before it starts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pyvseg.errors import VideoError
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.video_instances import CHUNK_BYTES
from pyvseg.video.reader import Video

QUEUE_BYTES = 256 << 20  # of decoded frames that wait between two stages
_NETWORK, _NETWORK_BASE = 950, 150 << 20  # bytes per pixel of a batch in float32, and of any batch; measured on ResNet-50 and Swin-L
_FEATURES = 250  # bytes per pixel that a joint model takes for every frame of the video: kept maps, joined, and its keys
_DECODER_FRAMES = 16  # that FFmpeg's threads hold, at 1.5 bytes a pixel
_CHUNKS = 6  # arrays of the size of a chunk of full-size masks that exist at once


def queue_frames(video: Video, step: int) -> int:
    """Frames that may wait between two stages: two steps of the model, fewer where frames are huge."""
    height, width = video.size
    return max(2, min(2 * step, QUEUE_BYTES // (3 * height * width)))


def needed(network: nn.Module, video: Video, step: int, at_once: int = 1) -> tuple[int, int]:
    """Bytes on the model's device and in main memory for `at_once` such videos, `step` frames of each in a batch."""
    s, (height, width) = network.settings, video.size
    size = FrameSize.of(height, width, s.short_side, s.long_side)
    pixels = size.padded[0] * size.padded[1] * network.dtype.itemsize / 4
    frames = _FEATURES * pixels * (video.frame_count or 0) if s.joint else 0
    batch = _NETWORK_BASE + at_once * _NETWORK * pixels * step
    masks = _CHUNKS * max(CHUNK_BYTES, 4 * height * width)  # not at the same time as a batch
    decoded = at_once * height * width * (3 * (queue_frames(video, step) + 2 * step) + 1.5 * _DECODER_FRAMES)
    return int(max(batch, masks) + at_once * frames), int(decoded)


def available(device: torch.device) -> int | None:
    """Free bytes of a device's memory; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    try:  # a container may allow less
        folder = Path("/sys/fs/cgroup")
        return min(free, int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    except (OSError, ValueError):
        return free


def check_memory(network: nn.Module, name: str, video: Video, step: int, at_once: int = 1) -> None:
    """Raises VideoError, with what to lower, where the memory will not do."""
    on_device, in_main = needed(network, video, step, at_once)
    host = torch.device("cpu")
    wants = [(network.device, on_device), (host, in_main)] if network.device.type == "cuda" else [(host, on_device + in_main)]
    for device, bytes_ in wants:
        free = available(device)
        if free is not None and bytes_ > free:
            height, width = video.size
            what = f"{width}x{height} frames" if not network.settings.joint else f"{video.frame_count} frames of {width}x{height}, seen together,"
            ways = ["--at-once 1"] if at_once > 1 else []
            ways += ["--precision bfloat16"] if network.dtype == torch.float32 else []
            ways += ["fewer --frames, or a model that goes frame by frame (minvis, ctvis)"] if network.settings.joint else []
            raise VideoError(
                f"{video.source}: {what} take {name} about {bytes_ / 1e9:.1f} GB of memory ({device}), {free / 1e9:.1f} GB are free; "
                f"try {', '.join([*ways, 'a smaller video'])}"
            )
