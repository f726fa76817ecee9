# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from pyvseg.verify import Rule, compare
from pyvseg.verify.compare import default_rule

MANIFEST = {"tolerance": {"rtol": 0.01, "atol": 0.1}}
X = np.array([0.0, 1.0, -10.0], np.float32)


def failed(result, expected=X, manifest=MANIFEST, name="out/x", **rule):
    return compare(manifest, name, np.asarray(result), np.asarray(expected), Rule(**rule) if rule else None).failed


def test_absolute_plus_relative():
    assert not failed(X + [0.09, 0.1, 0.19])
    assert failed(X + [0.11, 0, 0])
    assert failed(X + [0, 0, 0.21])


def test_tensor_tolerance_stands_above_the_cases():
    manifest = MANIFEST | {"tolerance_by_tensor": {"out/x": {"rtol": 0, "atol": 1e-3}}}
    assert failed(X + 2e-3, manifest=manifest)
    assert not failed(X + 2e-3, manifest=manifest, name="out/y")


def test_scaled_tolerance():
    assert not failed(X + 0.9, manifest=MANIFEST | {"tolerance_scale": "tensor maximum"})
    assert failed(X + 1.2, manifest=MANIFEST | {"tolerance_scale": "tensor maximum"})


def test_the_error_reported_is_the_largest():
    assert compare(MANIFEST, "out/x", X + [0.01, 0.05, 0], X).error == "5.00e-02"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_agree_only_with_themselves(bad):
    expected = np.array([1.0, bad])
    assert not failed(expected.copy(), expected)
    assert failed([1.0, 1.0], expected)
    assert failed([bad, bad], expected)
    assert failed([1.0, -bad], expected) or np.isnan(bad)


def test_thinned():
    manifest = MANIFEST | {"thinned": {"out/x": {"every": 2, "shape": [2, 3]}}}
    whole = np.arange(6.0).reshape(2, 3)
    assert not failed(whole, [0.0, 2.0, 4.0], manifest)
    assert failed(whole + 1, [0.0, 2.0, 4.0], manifest)
    assert failed(whole.T, [0.0, 2.0, 4.0], manifest)


def test_shape_and_kind():
    assert failed(X[None])
    assert failed([1.0], np.array([1]))


def test_integers_are_equal_but_for_a_share_of_labels():
    labels = np.zeros(1000, np.uint8)
    other = labels.copy()
    other[:2] = 1
    assert failed(other, labels)
    assert not failed(other, labels, MANIFEST | {"label_mismatch": 0.002}, "out/run/labels")
    assert failed(other, labels, MANIFEST | {"label_mismatch": 0.001}, "out/run/labels")
    assert failed(other, labels, MANIFEST | {"label_mismatch": 0.002}, "out/run/ids")


def test_bits_and_ties():
    packed = np.zeros(1000, np.uint8)
    other = packed.copy()
    other[:3] = 1
    assert not failed(other, packed, mismatch=0.001, bits=True)
    assert failed(other, packed, mismatch=0.0001, bits=True)
    assert not failed(other, packed, where=np.arange(1000) >= 3)
    assert failed(other, packed, where=np.arange(1000) >= 2)


def test_default_rule_of_floats_allows_no_mismatch():
    assert default_rule(MANIFEST, "out/x").mismatch == 0
