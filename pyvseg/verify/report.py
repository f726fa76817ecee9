# SPDX-License-Identifier: Apache-2.0
"""Running a case's adapter and collecting one line per tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyvseg.errors import PyvsegError
from pyvseg.verify.adapters import ADAPTERS, NotCovered
from pyvseg.verify.case import Case, load_case
from pyvseg.verify.compare import Line, compare


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

    A stored tensor that the adapter does not produce is a failure unless the adapter says why it is not covered.
    Raises PyvsegError for a folder that is no case, and for a system that has no adapter yet.
    """
    case = load_case(folder)
    system = case.manifest["system"]
    if system not in ADAPTERS:
        raise PyvsegError(f"{case.name}: no adapter for the system {system!r}; this version covers {', '.join(sorted(ADAPTERS))}")
    lines = {line.name: line for line in _lines(case, ADAPTERS[system])}
    absent = [Line(name, value.shape, "-", "-", "FAIL: not produced") for name, value in case.expected.items() if name not in lines]
    return Report(case.name, [*lines.values(), *absent])


def _lines(case: Case, run):
    for item in run(case.manifest, case.weights, case.inputs):
        name = item[0]
        if name not in case.expected:
            yield Line(name, (), "-", "-", "FAIL: the case stores no tensor of this name")
        elif isinstance(item[1], NotCovered):
            yield Line(name, case.expected[name].shape, "-", "-", f"not covered: {item[1].reason}")
        else:
            yield compare(case.manifest, name, item[1], case.expected[name], *item[2:])
