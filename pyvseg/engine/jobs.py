# SPDX-License-Identifier: Apache-2.0
"""What there is to do: one video with its masks, or every sequence of a DAVIS or YouTube-VOS folder."""

from dataclasses import dataclass
from pathlib import Path

from pyvseg.datasets.davis import Davis
from pyvseg.datasets.youtube_vos import YouTubeVOS
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
    dataset = Davis(root)
    required = YouTubeVOS(root).required_frames if (root / "meta.json").is_file() else None
    known = dataset.sequences()
    names = _listed(sequences, known, root) if sequences else known
    if not names:
        raise VideoError(f"{root}: no sequences in JPEGImages and Annotations; expected one folder of images and one of masks for each")
    jobs, first_only = [], 0
    for name in names:
        images, masks = dataset.frames(name), dataset.annotations(name)
        first = next(iter(masks))
        if annotations == "first" or (annotations == "auto" and len(masks) >= len(images)):
            masks, first_only = {first: masks[first]}, first_only + 1
        keep = frozenset(stem for stem in required(name) if stem >= first) if required else None
        jobs.append(Job(name, next(iter(images.values())).parent, masks, keep))
    note = f"{len(jobs)} sequences: first mask only for {first_only}, every given mask for {len(jobs) - first_only}"
    return jobs, note


def _listed(sequences: list[str], known: list[str], root: Path) -> list[str]:
    """Names given on the command line, or in the lines of a text file (ImageSets/.../val.txt)."""
    names = []
    for item in sequences:
        path = Path(item)
        names += path.read_text().split() if path.suffix == ".txt" and path.is_file() else [item]
    for name in names:
        if name not in known:
            raise PyvsegError(f"{root}: no sequence {name}; there are {', '.join(known[:5])}{', ...' if len(known) > 5 else ''}")
    return names
