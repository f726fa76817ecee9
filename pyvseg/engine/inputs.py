# SPDX-License-Identifier: Apache-2.0
"""From what the user names to the videos of a batch."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from pyvseg.engine.jobs import Job, find_jobs, find_videos, is_dataset
from pyvseg.engine.output import UNFINISHED
from pyvseg.errors import PyvsegError, VideoError

MASK_SUFFIXES = (".png", ".json", "")  # the last one for a folder


def find_inputs(inputs: list[str], masks: Path | None, needs_masks: bool, find: Callable[[Path], list[Job]] = find_videos) -> tuple[list[Job], list[str]]:
    """The videos behind files, folders, glob patterns, list files and data sets, in that order, and remarks worth a line each.

    A list file (.txt) holds one video in each line, relative to the list's folder; a tab and the path of its masks may follow.
    Empty lines and those that begin with # say nothing. A listed video that is not there is left to fail by itself.
    masks  a folder with NAME.png, NAME.json or NAME/ for the video called NAME
    find   the videos behind a folder or a JSON

    Paths become absolute, so that other machines find them.
    Raises PyvsegError where something cannot be meant: nothing found, or two videos for one name.
    """
    if not inputs:
        raise PyvsegError("no inputs; name videos, folders, patterns in quotes or .txt lists")
    found = [job for each in inputs for job in _of_input(each, needs_masks, find)]
    if masks is not None:
        if not masks.is_dir():
            raise PyvsegError(f"--masks {masks}: no such folder; it should hold NAME.png, NAME.json or NAME/ for each video called NAME")
        found = [job if job.masks is not None else replace(job, masks=_mask_of(masks, job.name)) for job in found]
    if needs_masks and all(job.masks is None for job in found):
        raise VideoError("labels are missing: say what to follow with --masks FOLDER (NAME.png, NAME.json or NAME/ for each video called NAME)")
    jobs: dict[str, Job] = {}
    remarks = []
    for job in found:
        other = jobs.setdefault(job.name, job)
        if other is job:
            continue
        if not same_place(other.source, job.source):
            raise PyvsegError(f"{other.source} and {job.source} would both write {job.name}; rename one, or run them into two --out folders")
        if str(other.masks) != str(job.masks):
            raise PyvsegError(f"{job.source}: named twice with different masks, {other.masks} and {job.masks}; take one of them out")
        remarks.append(f"{job.source}: named twice, run once")
    if UNFINISHED in jobs:
        raise PyvsegError(f"{jobs[UNFINISHED].source}: results called {UNFINISHED} would mix with the working folder; rename the video")
    return [replace(job, video=_absolute(job.video)) for job in jobs.values()], remarks


def same_place(first: str, second: str) -> bool:
    """Whether two paths lead to the same file or folder."""
    return Path(first).resolve() == Path(second).resolve()


def _absolute(video):
    return [path.absolute() for path in video] if isinstance(video, list) else Path(video).absolute()


def _of_input(given: str, needs_masks: bool, find: Callable[[Path], list[Job]]) -> Iterator[Job]:
    path = Path(given)
    if path.suffix == ".txt":
        yield from _listed(path)
    elif needs_masks and path.is_dir() and is_dataset(path):
        yield from find_jobs(path.absolute())[0]
    elif path.is_dir() or path.suffix == ".json":
        yield from (job if job.name else _job(path) for job in find(path))
    elif path.exists():
        yield _job(path)
    elif glob.has_magic(given):
        matches = sorted(glob.glob(given, recursive=True))
        if not matches:
            raise PyvsegError(f"{given}: matches nothing")
        yield from map(_job, map(Path, matches))
    else:
        raise PyvsegError(f"{given}: no such file or folder")


def _job(path: Path, masks: Path | None = None) -> Job:
    return Job(path.resolve().name if path.is_dir() else path.stem, path, masks and masks.absolute())


def _listed(path: Path) -> Iterator[Job]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` would split at characters that names may have
    except (OSError, UnicodeDecodeError) as error:
        raise PyvsegError(f"list {path}: cannot be read ({getattr(error, 'strerror', None) or 'not a text file'})") from None
    videos = [line.split("\t") for line in map(str.strip, lines) if line and not line.startswith("#")]
    if not videos:
        raise PyvsegError(f"list {path}: names no video; expected one path in each line")
    for video, *masks in videos:
        yield _job(path.parent / video.strip(), path.parent / masks[0].strip() if masks and masks[0].strip() else None)


def _mask_of(folder: Path, name: str) -> Path:
    """Where the masks of a video are; the first place to look where there are none, for the error to name."""
    places = [folder.absolute() / f"{name}{suffix}" for suffix in MASK_SUFFIXES]
    return next((place for place in places if place.exists()), places[0])
