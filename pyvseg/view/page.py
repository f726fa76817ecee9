# SPDX-License-Identifier: Apache-2.0
"""The page itself: index.html in the results folder, with data, style and script inside."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from pyvseg.video.writer import output_errors
from pyvseg.view.results import Entry, facts, find
from pyvseg.view.thumbnails import write_strip

_THREADS = 4  # decoders release the GIL


def write_page(root: str | Path, *, progress: bool = True) -> tuple[Path, int]:
    """Writes ROOT/index.html and the thumbnails beside each video's results; returns the page and the number of videos.

    The page names other files relative to itself, so a results folder can be moved or copied whole.
    Raises VideoError for a folder without results, OutputError where nothing can be written.
    """
    root = Path(root)
    entries = find(root)
    with ThreadPoolExecutor(_THREADS) as pool:
        each = pool.map(lambda entry: _describe(entry, root), entries)
        videos = list(tqdm(each, total=len(entries), unit=" videos", leave=False, disable=None if progress else True))
    page, temporary = root / "index.html", root / "index.html.part"
    with output_errors(page):
        temporary.write_text(_html(root.resolve().name, videos), encoding="utf-8")
        os.replace(temporary, page)
    return page, len(videos)


def _describe(entry: Entry, root: Path) -> dict:
    found = facts(entry)
    return {
        "name": entry.name, "error": entry.error, "frames": found.frames, "size": found.size, "fps": found.fps,
        "overlay": _url(entry.overlay, root), "strip": _url(write_strip(entry), root), "objects": [asdict(each) for each in found.objects],
    }  # fmt: skip


def _url(path: Path | None, root: Path) -> str | None:
    return path and quote(path.relative_to(root).as_posix())


def _html(title: str, videos: list[dict]) -> str:
    """Names come from strangers: they enter as data, where no `<` can end the script, and the script shows them as text only.
    The policy lets nothing run but that script, and nothing load but files beside the page."""
    template, style, script = (resources.files(__package__).joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    data = json.dumps({"title": title, "videos": videos}, separators=(",", ":")).replace("<", "\\u003c")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    parts = {"POLICY": f"'sha256-{allowed}'", "STYLE": style, "SCRIPT": script, "DATA": data}
    for name, text in parts.items():  # DATA last: nothing inside it is filled in
        template = template.replace(f"%{name}%", text, 1)
    return template
