# SPDX-License-Identifier: Apache-2.0
"""`pyvseg verify`"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from pyvseg.errors import PyvsegError


@dataclass
class Verify:
    """Check that this installation reproduces stored results of the published systems.

    Prints one line per tensor with its largest error, and one per case. The exit status is 0 when every case agrees.
    """

    cases: tyro.conf.Positional[tuple[Path, ...]]
    """Case folders (manifest.json and tensors.npz)."""
    quiet: bool = False
    """Print only failures and the line per case."""


def verify(options: Verify) -> int:
    if not options.cases:
        raise PyvsegError("no case to verify; name at least one case folder")
    return 0 if all([_verify(folder, options.quiet) for folder in options.cases]) else 1


def _verify(folder: Path, quiet: bool) -> bool:
    from pyvseg.verify import Report, load_case, run_case

    lines = []
    try:
        case = load_case(folder)
        for line in run_case(case):
            lines.append(line)
            if line.failed or not quiet:
                print(line, flush=True)
    except PyvsegError as error:
        print(f"pyvseg: error: {error}", file=sys.stderr)
        return False
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:  # one broken case must not hide the next
        print(f"{folder.name}: FAIL, stopped by {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        return False
    report = Report(case.name, lines)
    print(report.summary(), flush=True)
    return report.passed
