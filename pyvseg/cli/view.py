# SPDX-License-Identifier: Apache-2.0
"""`pyvseg view`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class View:
    """Write DIR/index.html, a page over the results in DIR: thumbnails, overlays that play, filters by class and score.

    It opens from the file system and asks no network for anything. DIR may hold the results of one video, of a dataset or of a
    batch; small JPEGs with thumbnails are written beside each video's results.
    """

    folder: tyro.conf.Positional[Path]
    """The --out folder of a run."""


def view(options: View) -> None:
    from pyvseg.view import write_page

    page, videos = write_page(options.folder)
    print(f"{videos} video{'s' if videos != 1 else ''}   {page}")
