# SPDX-License-Identifier: Apache-2.0
"""What there is to do: one video, every video of a folder, or every sequence of a data set."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pyvseg.datasets.cityscapes_dvps import frames_of
from pyvseg.datasets.davis import Davis
from pyvseg.datasets.imagenet_vid import ImageNetVID
from pyvseg.datasets.youtube_vis import YouTubeVIS, find_document
from pyvseg.datasets.youtube_vos import YouTubeVOS
from pyvseg.errors import PyvsegError, VideoError
from pyvseg.video.reader import IMAGE_SUFFIXES, VIDEO_SUFFIXES


@dataclass(frozen=True)
class Job:
    """One video of a run."""

    name: str
    video: object  # whatever `open_video` reads
    masks: object = None  # whatever `read_masks` reads
    keep: frozenset[str] | None = None  # frames that the benchmark wants; None for all
    id: int | str | None = None  # what results call the video; None: its name
    size: tuple[int, int] | None = None  # (height, width) that results must have
    categories: tuple[int | None, ...] | None = None  # what results call the model's classes; None: their numbers
    frame_ids: tuple[int, ...] | None = None  # what results call the frames; None: their numbers

    def __post_init__(self) -> None:
        """The name becomes a folder's or a file's. Raises VideoError where it cannot."""
        if self.name in (".", "..") or "/" in self.name:
            raise VideoError(f"{self.video}: results cannot be called {self.name!r}; rename the video")

    @property
    def source(self) -> str:
        """Where the video lies, for people and the manifest."""
        return str(self.video[0].parent if isinstance(self.video, list) else self.video)


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


def find_videos(source, sequences: list[str] | None = None, *, classes: tuple[str, ...] = (), model: str = "", boxes: bool = False) -> list[Job]:
    """The videos behind `source`: the JSON or the folder of a YouTube-VIS or OVIS split, with `boxes` one of ImageNet VID, a folder
    with JPEGImages/SEQUENCE, a split of Cityscapes-DVPS, a folder of videos (files, folders of images, or VSPW's VIDEO/origin), or a
    single video, whose job has no name. The results of a data set have its categories, by the names of the model's classes."""
    root = Path(source) if isinstance(source, (str, Path)) else None
    if root is None or not (root.suffix == ".json" or root.is_dir()):
        return [Job("", source)]
    if dvps := frames_of(root) if root.is_dir() else {}:
        jobs = [Job(name, files) for name, files in dvps.items()]
        return _only(jobs, sequences, root)
    inside = sorted(path for path in root.iterdir() if not path.name.startswith(".")) if root.is_dir() else []
    clips = [path for path in inside if path.suffix.lower() in VIDEO_SUFFIXES]
    if sum(path.suffix.lower() in IMAGE_SUFFIXES for path in inside) > len(clips):  # else they are pictures of the videos, one for each
        return [Job("", source)]
    if not clips and (root.suffix == ".json" or find_document(root)):
        dataset = ImageNetVID(root) if boxes else YouTubeVIS(root)
        numbers = dataset.category_ids(classes, model) if classes else None
        jobs = [Job(v.name, v.files, id=v.id, size=v.size, categories=numbers, frame_ids=v.frame_ids) for v in dataset.videos]
    else:
        if is_dataset(root):
            images = root / "JPEGImages"
            inside = sorted((images / "480p" if (images / "480p").is_dir() else images).iterdir())
        clips += [path for path in inside if path.is_dir() and any(p.suffix.lower() in IMAGE_SUFFIXES for p in _images(path).iterdir())]
        stems = Counter(path.stem for path in clips)
        jobs = [Job(path.stem if stems[path.stem] == 1 else path.name, _images(path)) for path in sorted(clips)]
    if not jobs:
        raise VideoError(f"{root}: neither images nor videos nor folders of images in there")
    return _only(jobs, sequences, root)


def _only(jobs: list[Job], sequences: list[str] | None, root: Path) -> list[Job]:
    if sequences:
        names = set(_listed(sequences, [job.name for job in jobs], root))
        jobs = [job for job in jobs if job.name in names]
    return jobs


def _images(video: Path) -> Path:
    return video / "origin" if (video / "origin").is_dir() else video


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
