# SPDX-License-Identifier: Apache-2.0
"""Label images as PNG: the pixel is the object id and the palette is only for viewing.

OpenCV turns palettes into colours and loses the ids, so PNGs are decoded by FFmpeg (through PyAV) and written here.
"""

import os
import struct
import zlib
from pathlib import Path

import av
import numpy as np

from pyvseg.errors import VideoError
from pyvseg.video.palette import PALETTE

MAX_PIXELS = 1 << 26  # 8192 x 8192: the most that the header of an image or a video may make us allocate

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_labels(path: str | Path) -> np.ndarray:
    """Reads a palette or 8-bit grey PNG as label indices.

    Returns uint8 (H, W): palette index, grey value, or 0/1 for 1-bit grey. Nothing is remapped; 255 stays 255.
    Raises VideoError for a file that cannot be read, is not a PNG, or stores colours in place of indices.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise VideoError(f"cannot read mask {path}: {error.strerror or error}") from None
    return decode_labels(data, str(path))


def decode_labels(data: bytes, name: str) -> np.ndarray:
    """Like `read_labels`, from the bytes of a PNG; `name` is what error messages call it."""
    if len(data) < 33 or data[:8] != _SIGNATURE or data[12:16] != b"IHDR":
        raise VideoError(f"mask {name} is not a PNG file; save masks as palette PNG (JPEG changes the ids)")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if width * height > MAX_PIXELS:
        raise VideoError(f"mask {name}: {width}x{height} is beyond the limit of {MAX_PIXELS} pixels")
    if colour in (2, 6):
        raise VideoError(f"mask {name} is an RGB image: object ids cannot be told from colours; save it as palette (indexed) or 8-bit grey PNG")
    if colour == 4 or depth == 16:
        raise VideoError(f"mask {name} has 16 bits or an alpha channel; save it as palette (indexed) or 8-bit grey PNG (at most 254 objects)")
    try:
        codec = av.CodecContext.create("png", "r")
        codec.options = {"err_detect": "crccheck+explode", "max_pixels": str(MAX_PIXELS)}
        (frame,) = codec.decode(av.Packet(data)) + codec.decode(None)
    except (av.FFmpegError, ValueError):
        raise VideoError(f"mask {name} is damaged or cut short; write it again") from None
    if colour == 0 and depth == 1:
        return (frame.to_ndarray(format="gray") > 0).astype(np.uint8)
    plane = frame.planes[0]
    labels = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, :width]
    return np.ascontiguousarray(labels)


def encode_labels(labels: np.ndarray, palette: np.ndarray = PALETTE) -> bytes:
    """A palette PNG of `labels`, uint8 (H, W); palette uint8 (256, 3), RGB."""
    height, width = labels.shape
    rows = np.zeros((height, width + 1), np.uint8)  # column 0 is the filter type of the row: 0, none
    rows[:, 1:] = labels
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", palette.tobytes()), (b"IDAT", zlib.compress(rows, 6)), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_labels(path: str | Path, labels: np.ndarray, palette: np.ndarray = PALETTE) -> None:
    """Writes `labels`, uint8 (H, W), as a palette PNG: whole or not at all. Raises OSError."""
    temporary = Path(f"{path}.part")
    try:
        temporary.write_bytes(encode_labels(labels, palette))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
