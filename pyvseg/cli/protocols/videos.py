# SPDX-License-Identifier: Apache-2.0
"""What the protocols share: which videos and frames belong together, reading ahead, and errors that say where they arose."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyvseg.errors import PyvsegError

if TYPE_CHECKING:
    from pyvseg.cli.eval import Eval

_AHEAD = 3  # images that wait decoded


def folders_of(results: Path) -> list[str]:
    """Names of the folders in there. Raises PyvsegError."""
    if not results.is_dir():
        raise PyvsegError(f"{results}: no such folder of results")
    return [path.name for path in results.iterdir() if path.is_dir()]


def chosen(options: Eval, annotated: list[str], there: list[str], results: Path) -> list[str]:
    """The videos to score: all that are annotated or those of --sequences. Every one of them must be `there`."""
    names = list(options.sequences) or annotated
    if not names:
        raise PyvsegError(f"{options.gt}: no annotated videos there")
    if unknown := sorted(set(names) - set(annotated)):
        raise PyvsegError(f"{options.gt}: no video {unknown[0]} among the {len(annotated)} annotated ones")
    if missing := [name for name in names if name not in set(there)]:
        raise PyvsegError(f"{results}: {len(missing)} of {len(names)} videos are missing, the first is {missing[0]}; --sequences scores some only")
    return names


def same_frames(results: Path, truth: dict, result: dict) -> None:
    """Both have the same frames, by stem, in the same order."""
    if missing := [stem for stem in truth if stem not in result]:
        raise PyvsegError(f"{results}: {len(missing)} of {len(truth)} frames are missing, the first is {missing[0]}")
    if extra := [stem for stem in result if stem not in truth]:
        raise PyvsegError(f"{results}: frame {extra[0]} is not annotated; results must have the annotated frames, {len(truth)}, and no others")
    if list(truth) != list(result):
        raise PyvsegError(f"{results}: the frames are not in the order of the annotation")


def read_ahead(read: Callable[[Path], np.ndarray], paths: Iterable[Path]) -> Iterator[np.ndarray]:
    """The images (H, W) of a video, decoded in a thread of their own, a few ahead. Raises PyvsegError where their size changes."""
    waiting, size = deque(), None
    with ThreadPoolExecutor(1) as pool:
        paths = iter(paths)
        while True:
            waiting.extend((path, pool.submit(read, path)) for path in islice(paths, 1 + _AHEAD - len(waiting)))
            if not waiting:
                return
            path, image = waiting.popleft()
            size = size or image.result().shape
            if image.result().shape != size:
                now = image.result().shape
                raise PyvsegError(f"{path}: the size changes from {size[1]}x{size[0]} to {now[1]}x{now[0]} within the video")
            yield image.result()


@contextmanager
def named(name: str) -> Iterator[None]:
    """Puts the name of what is being scored in front of an error's message."""
    try:
        yield
    except PyvsegError as error:
        raise PyvsegError(f"{name}: {error}") from None
