# SPDX-License-Identifier: Apache-2.0
"""Where the results of one video go: into a working folder while it runs, under their names when it is finished."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyvseg.errors import OutputError, PyvsegError, VideoError
from pyvseg.video.png import read_labels
from pyvseg.video.writer import output_errors

UNFINISHED = "unfinished"
_SHARED = threading.Lock()  # for what videos that finish at the same time have in common: the manifest and the folders above theirs


@dataclass(frozen=True)
class Targets:
    """The names of one video's finished results, and the folder in which they come about."""

    root: Path  # the output folder of the whole run
    work: Path
    files: dict[str, Path]  # name in `work` -> final name; the last one appears last, so a video that has it is finished
    folder: Path | None = None  # of a batch: `work` itself gets this name, all results at once and for good


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the message says what remains and how to go on."""


class VideoOutput:
    """Writes one video's results: `open`, then `write` each frame, then `finish`, or `suspend` to go on later, or `given_up`.

    `settings` is all that the masks depend on; a suspended run is resumed only under equal settings. `writers` are whatever
    `pyvseg.video.writer` has for the files wanted; what is not written in a run is not left over from an older one either.
    """

    def __init__(self, targets: Targets, name: str, settings: dict):
        self.targets, self.name, self.settings = targets, name, settings
        self.written = 0
        self.writers = []

    def is_finished(self) -> bool:
        """Whether the results are there, made under equal settings; a batch has its own manifest."""
        if self.targets.folder is not None:
            return False
        return list(self.targets.files.values())[-1].exists() and _read_json(self._manifest).get(self.name) == self.settings

    @property
    def _manifest(self) -> Path:
        """Finished videos of this folder and their settings."""
        return self.targets.root / "manifest.json"

    def resume_at(self) -> int:
        """The frame at which a suspended run goes on; 0 where there is nothing to go on from. With other settings a batch begins the
        video again, a run raises OutputError."""
        note = _read_json(self.targets.work / "run.json")
        if not note:
            return 0
        changed = [key for key in self.settings if note["settings"].get(key) != self.settings[key]]
        if changed and self.targets.folder is not None:
            return 0
        if changed:
            what = f"{changed[0]} was {note['settings'].get(changed[0])} and is now {self.settings[changed[0]]}"
            raise OutputError(f"cannot resume {self.targets.work}: {what}; use the same settings, or --overwrite to start again")
        return note["next_frame"] if self.state_path(note["next_frame"]).exists() else 0

    def state_path(self, next_frame: int) -> Path:
        return self.targets.work / f"state-{next_frame}.safetensors"

    def open(self, first: int) -> None:
        """Prepares the working folder, for a new run (`first` = 0) or one that goes on at frame `first`."""
        work = self.targets.work
        with output_errors(work):
            if not first:
                _remove(work)
            _make_folder(work)
            for path in work.glob(".*"):  # spools of a run that was killed after it had gone on
                _remove(path)
            if not first:
                self._note(0)

    def _note(self, next_frame: int) -> None:
        _write_json(self.targets.work / "run.json", {"settings": self.settings, "next_frame": next_frame})

    def given_up(self, error: BaseException, first: int) -> BaseException:
        """Cleans up after `error` and returns what to raise. Complete PNGs outlive Ctrl-C and a full disk; what a run went on from
        at frame `first` outlives all but bad input."""
        self.suspend()
        masks = self.targets.work / "masks"
        kept = len(list(masks.glob("*.png"))) if self.targets.folder is None else 0
        outside = isinstance(error, (KeyboardInterrupt, OutputError))
        if not (kept and outside) and (not first or isinstance(error, VideoError)):
            self.clean()
        if isinstance(error, KeyboardInterrupt):
            return Interrupted(f"stopped in {self.how_far(self.written)}; the same command with --resume goes on")
        if kept and outside:
            return OutputError(f"{error}; {kept} complete masks remain in {masks}, the same command with --resume goes on")
        return error

    def how_far(self, frames: int) -> str:
        return f"{self.name} after {frames} frames (kept in {self.targets.work})"

    def written_labels(self, name: str) -> np.ndarray:
        """What a suspended run wrote of the frame called so."""
        return read_labels(self.targets.work / "masks" / f"{name}.png")

    def write(self, result) -> None:
        for writer in self.writers:
            writer.write(result)
        self.written += 1

    def finish(self, keep: set[str] | None = None) -> None:
        """Closes every file and gives the results their names; `keep` are the frames whose PNGs are wanted, None for all."""
        for writer in self.writers:
            writer.close()
        work, files = self.targets.work, self.targets.files
        with output_errors(self.targets.root):
            for path in (work / "masks").glob("*") if keep is not None else ():
                if path.stem not in keep:
                    path.unlink()
            if self.targets.folder is not None:
                self._publish(self.targets.folder)
                return
            for number, (name, target) in enumerate(files.items()):
                if target.exists():
                    os.replace(target, work / f"replaced-{number}")
                if (work / name).exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(work / name, target)
            with _SHARED:
                _write_json(self._manifest, dict(sorted((_read_json(self._manifest) | {self.name: self.settings}).items())))
            self.clean()

    def _publish(self, folder: Path) -> None:
        work, old = self.targets.work, self.targets.work.with_name(f"{self.targets.work.name}.replaced")
        for path in (work / "run.json", *work.glob("state-*")):
            path.unlink(missing_ok=True)
        sync_tree(work)
        _remove(old)
        if folder.exists():
            os.replace(folder, old)
        os.replace(work, folder)
        sync_folder(folder.parent)
        _remove(old)

    def suspend(self, save: Callable[[Path], None] | None = None, next_frame: int = 0) -> None:
        """Leaves the complete PNGs and, with the state's `save`, what a later run needs to go on at `next_frame`."""
        for writer in self.writers:
            writer.discard()
        if save is not None:
            path = self.state_path(next_frame)
            with output_errors(path):
                save(path)
                sync_tree(path.parent)  # before the note that relies on it
                self._note(next_frame)
                for old in path.parent.glob("state-*"):
                    if not old.name.startswith(path.name):
                        old.unlink()

    def clean(self) -> None:
        """Removes everything unfinished of this video."""
        _remove(self.targets.work)
        with suppress(OSError), _SHARED:
            for folder in (self.targets.work.parent, self.targets.root):
                folder.rmdir()  # refuses unless it is empty


def check_out(out: Path, overwrite: bool, resume: bool) -> None:
    """Raises PyvsegError where a run must not write."""
    if overwrite and resume:
        raise PyvsegError("--overwrite and --resume exclude each other: start again, or go on")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; choose another --out folder")
    if overwrite or resume or not out.exists() or not any(out.iterdir()):
        return
    if (out / UNFINISHED).exists():
        raise OutputError(f"{out} already holds an unfinished run; continue it with --resume, or start again with --overwrite")
    raise OutputError(f"{out} already holds results or other files; choose another --out, or replace them with --overwrite")


def sync_tree(folder: Path) -> None:
    """Waits until the disk has every file below `folder`, and its name."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(Path(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """A new name outlives a crash of the machine only when the folder that holds it has been written."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_json(path: Path) -> dict:
    """The document, or {} where there is none or it is damaged."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _write_json(path: Path, document: dict) -> None:
    temporary = Path(f"{path}.part")
    temporary.write_text(json.dumps(document, indent=1))
    os.replace(temporary, path)


def _make_folder(folder: Path) -> None:
    """With its parents; other processes may be removing these, once they are empty."""
    for _ in range(9):
        with suppress(FileNotFoundError), _SHARED:
            folder.mkdir(parents=True, exist_ok=True)
            return
    folder.mkdir(parents=True, exist_ok=True)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def fingerprint(masks: dict[int, np.ndarray]) -> str:
    """A short hash of the given masks."""
    digest = hashlib.sha256()
    for index, labels in sorted(masks.items()):
        digest.update(f"{index} {labels.shape}".encode())
        digest.update(np.ascontiguousarray(labels))
    return digest.hexdigest()[:16]
