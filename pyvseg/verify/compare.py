# SPDX-License-Identifier: Apache-2.0
"""When a result agrees with the stored one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    """How far a result may be from the stored tensor."""

    rtol: float = 0.0
    atol: float = 0.0
    scaled: bool = False  # atol counts in units of the stored tensor's largest magnitude
    mismatch: float = 0.0  # the share of elements that may differ, or be off
    bits: bool = False  # integers are packed bits; mismatch is a share of the bits
    where: np.ndarray | None = None  # bool, the tensor's shape: False where two decisions tie, so that either is right


class Line(NamedTuple):
    """The outcome for one tensor, ready to print."""

    name: str
    shape: tuple[int, ...]
    error: str  # the largest absolute error, or how many elements differ
    allowed: str
    verdict: str  # "ok", "not covered: ..." or "FAIL: ..."

    def __str__(self) -> str:
        return f"  {self.name:<32} {_dims(self.shape):<16} {self.error:>12} (allowed {self.allowed})  {self.verdict}"

    @property
    def failed(self) -> bool:
        return self.verdict.startswith("FAIL")


def default_rule(manifest: dict, name: str) -> Rule:
    """The manifest's rule for the tensor `name`: its own tolerance, else the case's; integers are equal, but for the share of labels that may tie."""
    tolerance = manifest.get("tolerance_by_tensor", {}).get(name) or manifest["tolerance"]
    scaled = manifest.get("tolerance_scale") == "tensor maximum"
    labels = name.rsplit("/", 1)[-1] == "labels"
    return Rule(tolerance["rtol"], tolerance["atol"], scaled, mismatch=manifest.get("label_mismatch", 0.0) if labels else 0.0)


def compare(manifest: dict, name: str, result: np.ndarray, expected: np.ndarray, rule: Rule | None = None) -> Line:
    """Hold `result` (whole) against `expected` (as the case stores it) under `rule`, by default the manifest's."""
    result, rule = np.asarray(result), rule or default_rule(manifest, name)
    thinned = manifest.get("thinned", {}).get(name)
    shape = tuple(thinned["shape"]) if thinned else expected.shape
    if result.shape != shape:
        return Line(name, shape, "-", "-", f"FAIL: the result has shape {_dims(result.shape)}")
    if thinned:
        result = result.reshape(-1)[:: thinned["every"]]
    if np.issubdtype(expected.dtype, np.inexact):
        return _compare_floats(name, shape, result, expected, rule)
    return _compare_integers(name, shape, result, expected, rule)


def _compare_floats(name: str, shape: tuple[int, ...], result: np.ndarray, expected: np.ndarray, rule: Rule) -> Line:
    ours, theirs = result.astype(np.float64), expected.astype(np.float64)
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))  # infinities and NaN must stand in the same places
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.nan_to_num(np.abs(ours - theirs), nan=np.inf))
    magnitude = np.nan_to_num(np.abs(theirs), posinf=0.0)
    scale = magnitude.max(initial=0.0) if rule.scaled else 1.0
    excess = error > rule.atol * scale + rule.rtol * magnitude
    if rule.where is not None:
        excess &= rule.where
    allowed = f"{rule.atol * scale:.1e} + {rule.rtol:.0e}*|x|"
    verdict = f"FAIL: {excess.sum()} of {excess.size} elements are off" if excess.sum() > rule.mismatch * excess.size else "ok"
    return Line(name, shape, f"{error.max(initial=0.0):.2e}", allowed, verdict)


def _compare_integers(name: str, shape: tuple[int, ...], result: np.ndarray, expected: np.ndarray, rule: Rule) -> Line:
    if not (np.issubdtype(result.dtype, np.integer) or result.dtype == bool):
        return Line(name, shape, "-", "-", f"FAIL: the result is {result.dtype}, whole numbers are due")
    if rule.bits:
        result, expected = np.unpackbits(result), np.unpackbits(expected)
    differ = result != expected
    if rule.where is not None:
        differ &= rule.where
    share = differ.sum() / max(differ.size, 1)
    unit = "bits" if rule.bits else "elements"
    verdict = f"FAIL: {differ.sum()} of {differ.size} {unit} differ" if share > rule.mismatch else "ok"
    return Line(name, shape, f"{differ.sum()} differ", f"{rule.mismatch:.1%} differ" if rule.mismatch else "0 differ", verdict)


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
