# SPDX-License-Identifier: Apache-2.0
"""What there is to do: one video with its masks, or every sequence of a DAVIS or YouTube-VOS folder."""

import json
from dataclasses import dataclass
from pathlib import Path

from pyvseg.errors import PyvsegError, VideoError


@dataclass(frozen=True)
class Job:
    """One video of a run."""

    name: str
    video: object  # whatever `open_video` reads
    masks: object  # whatever `read_masks` reads
    keep: frozenset[str] | None = None  # frames that the benchmark wants; None for all


def is_dataset(source) -> bool:
    return isinstance(source, (str, Path)) and (Path(source) / "JPEGImages").is_dir()


def find_jobs(root: Path, annotations: str = "auto", sequences: list[str] | None = None) -> tuple[list[Job], str]:
    """The sequences of a dataset folder and a line that says which masks are used.

    ROOT/JPEGImages[/480p]/SEQUENCE/*.jpg and ROOT/Annotations[/480p]/SEQUENCE/*.png, as DAVIS and YouTube-VOS have them.
    annotations: "first" uses the mask of the first annotated frame (DAVIS: every frame is annotated, for scoring),
    "all" uses every mask (YouTube-VOS: a frame's PNG holds the objects that enter there), "auto" takes "first" for
    sequences with a mask at every frame and "all" for the others.
    """
    images, masks = _resolution(root / "JPEGImages"), _resolution(root / "Annotations")
    found = sorted(path.name for path in images.iterdir() if path.is_dir())
    names = _listed(sequences, found, images) if sequences else found
    if not names:
        raise VideoError(f"{images}: no sequences in this folder; expected one folder of images per sequence")
    missing = [name for name in names if not any((masks / name).glob("*.png"))]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise VideoError(f"{masks / missing[0]}: no masks for this sequence{more}; add its first mask as palette PNG, or choose others with --sequences")
    required = _required_frames(root)
    jobs, first_only = [], 0
    for name in names:
        files = sorted((masks / name).glob("*.png"))
        frames = sum(1 for _ in (images / name).iterdir())
        first = annotations == "first" or (annotations == "auto" and len(files) >= frames)
        first_only += first
        jobs.append(_job(name, images / name, files[:1] if first else files, required.get(name)))
    note = f"{len(jobs)} sequences: the first mask only for {first_only}, every given mask for {len(jobs) - first_only}"
    return jobs, note


def _resolution(folder: Path) -> Path:
    if not folder.is_dir():
        raise VideoError(f"{folder}: no such folder; a dataset needs JPEGImages and Annotations")
    return folder / "480p" if (folder / "480p").is_dir() else folder


def _listed(sequences: list[str], found: list[str], images: Path) -> list[str]:
    """Names given on the command line, or in the lines of a text file (ImageSets/.../val.txt)."""
    names = []
    for item in sequences:
        names += Path(item).read_text().split() if item.endswith(".txt") and Path(item).is_file() else [item]
    for name in names:
        if name not in found:
            raise PyvsegError(f"{images}: no sequence {name}; there are {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}")
    return names


def _required_frames(root: Path) -> dict[str, frozenset[str]]:
    """Frames that YouTube-VOS asks for, from its meta.json; empty for other datasets."""
    path = root / "meta.json"
    if not path.is_file():
        return {}
    try:
        videos = json.loads(path.read_text())["videos"]
        return {name: frozenset(f for o in video["objects"].values() for f in o["frames"]) for name, video in videos.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise VideoError(f"{path}: not the meta.json of YouTube-VOS; mend or remove it") from None


def _job(name: str, folder: Path, files: list[Path], required: frozenset[str] | None) -> Job:
    keep = None
    if required is not None:
        keep = frozenset(stem for stem in required if stem >= files[0].stem)
    return Job(name, folder, {file.stem: file for file in files}, keep)
