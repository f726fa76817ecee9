# SPDX-License-Identifier: Apache-2.0
"""One row of the list of models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Variant:
    """One line of `pyvseg models`.

    settings   of the system: `STCNSettings`, `Mask2FormerSettings`, ...
    file       name of the published weights file, or of the bundled one
    published  results its authors report
    """

    name: str
    task: str
    system: str
    settings: Any
    file: str
    where: str
    licence: str
    published: dict[str, str] = field(default_factory=dict)
    note: str = ""
    classes: tuple[str, ...] = ()  # names, where the data set gives them

    @property
    def bundled(self) -> Path | None:
        path = BUNDLED / self.file
        return path if path.is_file() else None
