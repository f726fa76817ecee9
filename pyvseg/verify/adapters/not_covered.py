# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple


class NotCovered(NamedTuple):
    """Stands for a result that pyvseg does not compute, and says why."""

    reason: str
