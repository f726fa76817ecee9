# SPDX-License-Identifier: Apache-2.0
"""In place of PyAV on machines that have none, in front of which `benchmarks/gpu.sh` puts it: what is imported, and no video files."""


class FFmpegError(Exception):
    strerror = ""


class VideoFrame:
    pass


def open(*args, **options):
    raise ImportError("no PyAV on this machine: image folders only, no overlays")
