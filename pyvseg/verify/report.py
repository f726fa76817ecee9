# SPDX-License-Identifier: Apache-2.0
"""Running a case's adapter and collecting one line per tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyvseg.errors import PyvsegError
from pyvseg.verify.adapters import ADAPTERS, NotCovered
from pyvseg.verify.case import Case, load_case
from pyvseg.verify.compare import Line, Rule, compare


@dataclass(frozen=True)
class Report:
    """What became of one case."""

    case: str
    lines: list[Line]

    @property
    def passed(self) -> bool:
        return not any(line.failed for line in self.lines)

    def summary(self) -> str:
        agree = sum(line.verdict == "ok" for line in self.lines)
        failed = sum(line.failed for line in self.lines)
        left_out = len(self.lines) - agree - failed
        parts = [f"{agree} tensors agree", f"{failed} FAIL" if failed else "", f"{left_out} not covered" if left_out else ""]
        return f"{self.case}: {'FAIL' if failed else 'ok'}, {', '.join(filter(None, parts))}"


def verify_case(folder: str | Path) -> Report:
    """Run the case in `folder` on this installation and compare every tensor that it stores.

    Raises PyvsegError for a folder that is no case, and for a system that has no adapter yet.
    """
    case = load_case(folder)
    return Report(case.name, list(run_case(case)))


def run_case(case: Case) -> Iterator[Line]:
    """The same for a loaded case, line by line as the results come.

    A stored tensor that the adapter does not produce is a failure unless the adapter says why it is not covered.
    """
    system = case.manifest["system"]
    if system not in ADAPTERS:
        raise PyvsegError(f"{case.name}: no adapter for the system {system!r}; this version covers {', '.join(sorted(ADAPTERS))}")
    produced = set()
    for name, result, *rule in ADAPTERS[system](case.manifest, case.weights, case.inputs):
        produced.add(name)
        yield _line(case, name, result, *rule)
    for name in sorted(case.expected.keys() - produced):
        yield Line(name, case.expected[name].shape, "-", "-", "FAIL: not produced")


def _line(case: Case, name: str, result: np.ndarray | NotCovered, *rule: Rule) -> Line:
    if name not in case.expected:
        return Line(name, (), "-", "-", "FAIL: the case stores no tensor of this name")
    if isinstance(result, NotCovered):
        return Line(name, case.expected[name].shape, "-", "-", f"not covered: {result.reason}")
    return compare(case.manifest, name, result, case.expected[name], *rule)
