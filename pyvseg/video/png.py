# SPDX-License-Identifier: Apache-2.0
"""Label images as PNG: the pixel is the object id and the palette is only for viewing. And PNGs whose three channels are numbers, or
whose one channel is a number of 16 bits.

OpenCV turns palettes into colours and loses the ids, so PNGs are decoded by FFmpeg (through PyAV) and written here.
"""

import os
import struct
import zlib
from pathlib import Path

import av
import cv2
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
    return decode_labels(_read(path), str(path))


def decode_labels(data: bytes, name: str) -> np.ndarray:
    """Like `read_labels`, from the bytes of a PNG; `name` is what error messages call it."""
    colour, depth = _header(data, name)
    if colour in (2, 6):
        raise VideoError(f"mask {name} is an RGB image: object ids cannot be told from colours; save it as palette (indexed) or 8-bit grey PNG")
    if colour == 4 or depth == 16:
        raise VideoError(f"mask {name} has 16 bits or an alpha channel; save it as palette (indexed) or 8-bit grey PNG (at most 254 objects)")
    frame = _decode(data, name)
    if colour == 0 and depth == 1:
        return (frame.to_ndarray(format="gray") > 0).astype(np.uint8)
    return np.ascontiguousarray(_rows(frame)[:, : frame.width])


def read_channels(path: str | Path) -> np.ndarray:
    """Reads an 8-bit RGB PNG whose channels are numbers, not colours: uint8 (H, W, 3), R first.

    Raises VideoError for a file that cannot be read, is not a PNG, or has another number of channels or bits.
    """
    data, name = _read(path), str(path)
    colour, depth = _header(data, name)
    if (colour, depth) != (2, 8):
        raise VideoError(f"mask {name} is not an RGB PNG of 8 bits per channel; panoptic maps keep their ids in the three channels")
    frame = _decode(data, name)
    return _rows(frame)[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)


def read_numbers(path: str | Path) -> np.ndarray:
    """Reads a grey PNG of 16 bits: uint16 (H, W). Raises VideoError for a file that cannot be read, or is none."""
    data, name = _read(path), str(path)
    if _header(data, name) != (0, 16):
        raise VideoError(f"{name} is not a grey PNG of 16 bits, which maps of depth are")
    frame = _decode(data, name)
    return np.ascontiguousarray(_rows(frame)[:, : 2 * frame.width]).view(">u2").astype(np.uint16)


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise VideoError(f"cannot read mask {path}: {error.strerror or error}") from None


def _header(data: bytes, name: str) -> tuple[int, int]:
    """Colour type and bit depth of a PNG that is not too large."""
    if len(data) < 33 or data[:8] != _SIGNATURE or data[12:16] != b"IHDR":
        raise VideoError(f"mask {name} is not a PNG file; save masks as palette PNG (JPEG changes the ids)")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if width * height > MAX_PIXELS:
        raise VideoError(f"mask {name}: {width}x{height} is beyond the limit of {MAX_PIXELS} pixels")
    return colour, depth


def _decode(data: bytes, name: str) -> av.VideoFrame:
    try:
        codec = av.CodecContext.create("png", "r")
        codec.options = {"err_detect": "crccheck+explode", "max_pixels": str(MAX_PIXELS)}
        (frame,) = codec.decode(av.Packet(data)) + codec.decode(None)
    except (av.FFmpegError, ValueError):
        raise VideoError(f"mask {name} is damaged or cut short; write it again") from None
    return frame


def _rows(frame: av.VideoFrame) -> np.ndarray:
    """The bytes of a packed frame, uint8 (H, bytes of a row and its padding)."""
    plane = frame.planes[0]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height]


def encode_labels(labels: np.ndarray, palette: np.ndarray = PALETTE) -> bytes:
    """A palette PNG of `labels`, uint8 (H, W); palette uint8 (256, 3), RGB."""
    return _encode(labels, colour=3, before=_chunk(b"PLTE", palette.tobytes()))


def _encode(image: np.ndarray, colour: int, before: bytes = b"") -> bytes:
    """image uint8 (H, W) or (H, W, 3); `before` are the chunks between header and pixels."""
    height, width = image.shape[:2]
    rows = np.zeros((height, image[0].size + 1), np.uint8)  # column 0 is the filter type of the row: 0, none
    rows[:, 1:] = image.reshape(height, -1)
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return _SIGNATURE + header + before + _chunk(b"IDAT", _deflate(rows, runs=colour == 3)) + _chunk(b"IEND", b"")


def _deflate(rows: np.ndarray, runs: bool) -> bytes:
    """`runs`: looks for nothing but repeated bytes, which of labels are most: twice as fast, and no longer."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE if runs else zlib.Z_DEFAULT_STRATEGY)
    return compressor.compress(rows) + compressor.flush()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_labels(path: str | Path, labels: np.ndarray, palette: np.ndarray = PALETTE) -> None:
    """Writes `labels`, uint8 (H, W), as a palette PNG: whole or not at all. Raises OSError."""
    _write(path, encode_labels(labels, palette))


def write_channels(path: str | Path, channels: np.ndarray) -> None:
    """Writes uint8 (H, W, 3) as an RGB PNG that `read_channels` gives back: whole or not at all. Raises OSError."""
    _write(path, _encode(channels, colour=2))


def write_numbers(path: str | Path, numbers: np.ndarray) -> None:
    """Writes uint16 (H, W) as a grey PNG that `read_numbers` gives back: whole or not at all. Raises OSError."""
    _, data = cv2.imencode(".png", numbers, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    _write(path, data.tobytes())


def _write(path: str | Path, data: bytes) -> None:
    temporary = Path(f"{path}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
