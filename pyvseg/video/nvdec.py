# SPDX-License-Identifier: Apache-2.0
"""Video files decoded by the GPU's own decoder (NVDEC) through torchcodec: optional, `pip install 'pyvseg[nvdec]'`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path

import numpy as np

from pyvseg.errors import PyvsegError, VideoError

_TOGETHER = 8  # frames that are fetched at a time


def check() -> None:
    """Raises PyvsegError where NVDEC cannot be used, with what is missing."""
    _decoder_class()


def decode(path: Path) -> Iterator[np.ndarray]:
    """The frames as uint8 RGB (H, W, 3) in main memory, where masks and overlays are drawn. Raises VideoError for a damaged file.

    Colours differ from FFmpeg's in the last bits, and with them a few pixels of the masks.
    """
    decoder = _decoder_class()
    try:
        with _fast_backend():
            video = decoder(str(path), device="cuda", dimension_order="NHWC")
        stream = _stream()
        for start in range(0, len(video), _TOGETHER):
            with stream:
                frames = video.get_frames_in_range(start, min(start + _TOGETHER, len(video))).data.cpu()
            yield from frames.numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VideoError(f"{path}: NVDEC cannot decode it ({reason}); try --decoder cpu") from None


def _stream() -> AbstractContextManager:
    """One of its own, or every frame would come behind all that the networks have under way."""
    import torch

    return torch.cuda.stream(torch.cuda.Stream())


def _fast_backend() -> AbstractContextManager:
    """torchcodec's own use of NVDEC, faster than FFmpeg's, where this release has it and not yet as its default."""
    choose = getattr(import_module("torchcodec.decoders"), "set_cuda_backend", None)
    return choose("beta") if choose else nullcontext()


def _decoder_class() -> type:
    try:
        import torch
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:  # torchcodec loads FFmpeg's libraries at once
        raise PyvsegError(f"--decoder nvdec needs torchcodec: pip install 'pyvseg[nvdec]' ({str(error).splitlines()[0]})") from None
    if not torch.cuda.is_available():
        raise PyvsegError("--decoder nvdec needs a CUDA GPU, and PyTorch sees none; leave it out")
    return VideoDecoder
