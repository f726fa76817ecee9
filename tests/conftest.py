# SPDX-License-Identifier: Apache-2.0
"""What every test may use."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run: a failure can be repeated, and a busy machine fails nothing.
settings.register_profile("pyvseg", derandomize=True, deadline=None)
settings.load_profile("pyvseg")

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("PYVSEG_SHARED", ROOT.parent / "shared"))


def shared(*parts: str) -> Path:
    """A stored case or data folder; the test is skipped, with a reason, on a machine that lacks it."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not here; set PYVSEG_SHARED to the folder that holds the stored cases and data")
    return path
