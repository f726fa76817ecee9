# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the op tests."""

import pytest
import torch

from pyvseg.ops import _dispatch

ISAS = _dispatch.extension.isas() if _dispatch.extension else []


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    """Runs a test once on every instruction set that this CPU has."""
    before = _dispatch.extension.isa()
    _dispatch.extension.set_isa(request.param)
    yield request.param
    _dispatch.extension.set_isa(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
