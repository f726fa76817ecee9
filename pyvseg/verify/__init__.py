# SPDX-License-Identifier: Apache-2.0
"""Holding this installation against stored results of the published systems.

A case is a folder with the inputs, weights and results of one run of a published implementation. An adapter runs the same
on pyvseg; every tensor that the case stores must come out within the tolerance that the case states.
"""

from pyvseg.verify.case import Case, load_case
from pyvseg.verify.compare import Line, Rule, compare
from pyvseg.verify.report import Report, run_case, verify_case

__all__ = ["Case", "Line", "Report", "Rule", "compare", "load_case", "run_case", "verify_case"]
