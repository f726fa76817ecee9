# SPDX-License-Identifier: Apache-2.0
"""What every test may use."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if library := os.environ.get("PYVSEG_TEST_EXTENSION"):  # another build of pyvseg._C: that of `make sanitize`
    spec = importlib.util.spec_from_file_location("pyvseg._C", library)
    sys.modules["pyvseg._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pyvseg._C"])

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any Triton kernel is imported

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
