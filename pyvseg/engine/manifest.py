# SPDX-License-Identifier: Apache-2.0
"""What a batch has done, on disk: one line of JSON for each video that ended, there for good before the next one is begun."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

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
    """How a video ended. `reason` is None when its results are there; `seconds` count from opening it; `note` is what to know of them."""

    name: str
    source: str
    reason: str | None = None
    frames: int = 0
    seconds: float = 0.0
    note: str = ""


class Manifest:
    """The outcomes of all videos of an output folder, by name; the last one counts.

    Every process writes a file of its own, OUT/manifest*.jsonl, and reads those of all. Its first line holds the settings.
    Lines that a crash damaged are left out (`damaged` counts them): their videos run again.
    Raises OutputError for results made with other settings, and where another process is writing the same file.
    """

    def __init__(self, out: Path, settings: dict, *, part: str = "", overwrite: bool = False) -> None:
        self.path = out / f"manifest{part}.jsonl"
        self.outcomes: dict[str, Outcome] = {}
        self.damaged = 0
        files = sorted(out.glob("manifest*.jsonl"))
        with output_errors(self.path):
            out.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")
        self._lock()
        if overwrite:
            with output_errors(self.path):
                for path in files:
                    os.truncate(path, 0)
        whole = [self._read(path, settings) for path in files]
        self._begin(settings, fresh=self.path not in files or not whole[files.index(self.path)])

    def _lock(self) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._file.close()
                raise OutputError(f"{self.path}: another pyvseg batch is writing there; wait for it, or share the work with --shard") from None

    def _read(self, path: Path, settings: dict) -> bool:
        """Takes in one file; False if there is nothing in it."""
        with output_errors(path):
            lines = path.read_bytes().split(b"\n")
        documents = [_parse(line) for line in lines if line.strip()]
        entries = [_outcome(document) for document in documents[1:]]
        found = documents[0].get("settings") if documents and documents[0].get("format") == FORMAT else None
        if not isinstance(found, dict):
            if any(entries):
                raise OutputError(f"{path}: the first line is damaged, so nothing tells how these results were made; choose another --out, or start again with --overwrite")
            if documents:  # a crash while the file began
                with output_errors(path):
                    os.truncate(path, 0)
            return False
        changed = [f"{key} was {found.get(key)} and is now {settings.get(key)}" for key in sorted({*found, *settings}) if found.get(key) != settings.get(key)]
        if changed:
            raise OutputError(f"{path.parent} holds results made with other settings: {', '.join(changed)}; choose another --out, or replace them with --overwrite")
        self.damaged += entries.count(None)
        self.outcomes |= {entry.name: entry for entry in entries if entry}
        return True

    def _begin(self, settings: dict, fresh: bool) -> None:
        if fresh:
            self._append({"format": FORMAT, "settings": settings})
            with output_errors(self.path):
                sync_folder(self.path.parent)
            return
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        if torn:  # what follows must not be taken for a part of the torn line
            with output_errors(self.path):
                self._file.write(b"\n")

    def add(self, outcome: Outcome) -> None:
        """Notes how a video ended; returns when the disk has it."""
        self.outcomes[outcome.name] = outcome
        self._append({"status": "failed" if outcome.reason else "done", **asdict(outcome)})

    def _append(self, document: dict) -> None:
        with output_errors(self.path):
            self._file.write(json.dumps(document).encode("ascii") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _parse(line: bytes) -> dict:
    try:
        document = json.loads(line)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _outcome(document: dict) -> Outcome | None:
    try:
        reason = document["reason"] if document["status"] == "failed" else None
        return Outcome(str(document["name"]), str(document["source"]), reason, int(document["frames"]), float(document["seconds"]))
    except (KeyError, TypeError, ValueError):
        return None
