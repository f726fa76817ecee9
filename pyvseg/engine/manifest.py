# SPDX-License-Identifier: Apache-2.0
"""What a batch has done, on disk: one line of JSON for each video that ended, there for good before the next one is begun."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from pyvseg.engine.output import sync_folder
from pyvseg.errors import OutputError
from pyvseg.video.writer import output_errors

try:
    import fcntl
except ImportError:  # Windows: nobody looks whether two batches write to one folder
    fcntl = None

FORMAT = "pyvseg-batch"


@dataclass(frozen=True)
class Outcome:
    """How a video ended. `reason` is None when its results are there; `seconds` count from its first frame's turn, beside others that are
    under way; `note` is what to know of them."""

    name: str
    source: str
    reason: str | None = None
    frames: int = 0
    seconds: float = 0.0
    note: str = ""


class Manifest:
    """The outcomes of all videos of an output folder, by name; the last one counts, and what is done in one file outweighs a failure in another.

    Every process writes a file of its own, OUT/manifest*.jsonl, and reads those of all. Its first line holds the settings.
    Lines that a crash damaged are left out (`damaged` counts them): their videos run again.

    part       of the file's name, "-I-of-N" for a shard
    overwrite  forgets what is done; a shard leaves the files of others with the same settings, and goes by none of them

    Raises OutputError for results made with other settings, and where another process writes the same file or shares the work otherwise.
    """

    def __init__(self, out: Path, settings: dict, *, part: str = "", overwrite: bool = False) -> None:
        self.path, self.settings = out / f"manifest{part}.jsonl", settings
        self.outcomes: dict[str, Outcome] = {}
        self.damaged = 0
        with output_errors(self.path):
            new = not out.exists()
            out.mkdir(parents=True, exist_ok=True)
            if new:
                sync_folder(out.absolute().parent)
            self._file = open(self.path, "ab")
        try:
            self._lock()
            for path in sorted(out.glob("manifest*.jsonl")):
                self._consider(path, overwrite)
            self._begin()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        for wait in (0.1, 0.4, None):  # another process may be looking whether the file is in use
            if not _locked(self._file, fcntl and fcntl.LOCK_EX):
                return
            if wait is None:
                raise OutputError(f"{self.path}: another pyvseg batch is writing there; wait for it, or share the work with --shard")
            time.sleep(wait)

    def _consider(self, path: Path, overwrite: bool) -> None:
        """Takes in one file, or empties it where nothing in it is to be kept."""
        settings, entries = _read(path)
        own, sharing = path == self.path, _shards(path) == _shards(self.path)
        if settings is None and not entries and not own:
            return  # another process has created it a moment ago, or died then
        changed = "" if settings is None else _changes(settings, self.settings)
        if not own and (changed or not sharing) and _in_use(path):
            raise OutputError(f"{path}: another pyvseg batch, with other {f'settings ({changed})' if changed else 'shards'}, is writing there; wait for it, or choose another --out")
        if not overwrite and settings is None and any(entries):
            raise OutputError(f"{path}: the first line is damaged, so nothing tells how these results were made; choose another --out, or start again with --overwrite")
        if not overwrite and changed and any(entry and not entry.reason for entry in entries):
            raise OutputError(f"{path.parent} holds results made with other settings: {changed}; choose another --out, or replace them with --overwrite")
        if settings is None or changed or (overwrite and (own or not sharing)):
            with output_errors(path):
                os.truncate(path, 0)
        elif not overwrite:
            self._take(entries)

    def _take(self, entries: list[Outcome | None]) -> None:
        self.damaged += entries.count(None)
        for name, entry in {entry.name: entry for entry in entries if entry}.items():
            if name not in self.outcomes or self.outcomes[name].reason:
                self.outcomes[name] = entry

    def _begin(self) -> None:
        with output_errors(self.path):
            with open(self.path, "rb") as file:
                last = file.read()[-1:]
            if last not in (b"", b"\n"):  # what follows must not be taken for a part of the torn line
                self._file.write(b"\n")
        if not last:
            self._append({"format": FORMAT, "settings": self.settings})
            with output_errors(self.path):
                sync_folder(self.path.parent)

    def add(self, outcome: Outcome) -> None:
        """Notes how a video ended; returns when the disk has it."""
        self.outcomes[outcome.name] = outcome
        speed = {"fps": round(outcome.frames / outcome.seconds, 2)} if outcome.seconds else {}
        self._append({"status": "failed" if outcome.reason else "done", **asdict(outcome), **speed})

    def _append(self, document: dict) -> None:
        with output_errors(self.path):
            self._file.write(json.dumps(document).encode("ascii") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # a full disk refuses again what `_append` could not write, and has said so
            self._file.close()


def _changes(before: dict, now: dict) -> str:
    return ", ".join(f"{key} was {before.get(key)} and is now {now.get(key)}" for key in sorted({*before, *now}) if before.get(key) != now.get(key))


def _shards(path: Path) -> str:
    """N of manifest-I-of-N.jsonl; "" for the file of all."""
    return path.stem.rpartition("-of-")[2] if "-of-" in path.stem else ""


def _locked(file: IO, kind: int | None) -> bool:
    """Whether another process holds a lock; if not, this one holds it now. False also where the file system knows no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _in_use(path: Path) -> bool:
    with output_errors(path), open(path, "rb") as file:
        return _locked(file, fcntl and fcntl.LOCK_SH)


def _read(path: Path) -> tuple[dict | None, list[Outcome | None]]:
    """The settings, None where the first line does not tell, and the outcomes, None for damaged ones."""
    with output_errors(path):
        lines = path.read_bytes().split(b"\n")
    documents = [_parse(line) for line in lines if line.strip()]
    settings = documents[0].get("settings") if documents and documents[0].get("format") == FORMAT else None
    return settings if isinstance(settings, dict) else None, [_outcome(document) for document in documents[1:]]


def _parse(line: bytes) -> dict:
    try:
        document = json.loads(line)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _outcome(document: dict) -> Outcome | None:
    try:
        reason = document["reason"] if document["status"] == "failed" else None
        note = str(document.get("note", ""))
        return Outcome(str(document["name"]), str(document["source"]), reason, int(document["frames"]), float(document["seconds"]), note)
    except (KeyError, TypeError, ValueError):
        return None
