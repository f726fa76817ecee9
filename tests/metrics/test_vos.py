# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pyvseg.errors import PyvsegError
from pyvseg.metrics import vos
from pyvseg.video.png import read_labels
from tests.conftest import shared

MASKS = arrays(bool, st.tuples(st.integers(1, 20), st.integers(1, 20)))


def slow_boundary(mask):
    """The definition, pixel by pixel."""
    height, width = mask.shape
    result = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            here, inside_y, inside_x = mask[y, x], y + 1 < height, x + 1 < width
            result[y, x] = (
                (inside_x and mask[y, x + 1] != here)
                or (inside_y and mask[y + 1, x] != here)
                or (inside_x and inside_y and mask[y + 1, x + 1] != here)
            )
    return result


def slow_f(annotation, result, radius):
    """The definition, with every pair of boundary pixels compared."""
    ours, theirs = np.argwhere(slow_boundary(annotation)), np.argwhere(slow_boundary(result))
    if len(ours) == 0 or len(theirs) == 0:
        return float(len(ours) == len(theirs))
    close = ((ours[:, None] - theirs[None]) ** 2).sum(-1) <= radius**2
    recall, precision = close.any(1).mean(), close.any(0).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@given(MASKS)
def test_boundary_map_is_the_definition(mask):
    assert (vos.boundary_map(mask) == slow_boundary(mask)).all()


@settings(deadline=None)
@given(st.data(), st.integers(1, 6))
def test_boundary_measure_is_the_definition(data, radius):
    a = data.draw(MASKS)
    b = data.draw(arrays(bool, a.shape))
    assert vos.boundary_f(vos.boundary(a, radius), vos.boundary(b, radius)) == pytest.approx(slow_f(a, b, radius), abs=1e-15)


def test_boundary_measure_of_large_sparse_masks():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 150, 300)) < 2e-3
    for radius in (3, 8, 12, 18):
        assert vos.boundary_f(vos.boundary(a, radius), vos.boundary(b, radius)) == pytest.approx(slow_f(a, b, radius), abs=1e-15)


@pytest.mark.parametrize("size, radius", [((480, 854), 8), ((720, 1280), 12), ((1080, 1920), 18), ((48, 64), 1)])
def test_radius(size, radius):
    assert vos.boundary_radius(*size) == radius
    assert vos.boundary_radius(*size, bound_th=3) == 3


@settings(deadline=None)
@given(arrays(np.uint8, (9, 11), elements=st.integers(0, 4)), arrays(np.uint8, (9, 11), elements=st.integers(0, 3)), arrays(bool, (9, 11)))
def test_jaccard_is_the_definition(annotation, result, void):
    got = vos.jaccard(annotation, result, 3, 3, void)
    for i in range(3):
        for k in range(3):
            a, b = (annotation == i + 1) & ~void, (result == k + 1) & ~void
            assert got[i, k] == ((a & b).sum() / (a | b).sum() if (a | b).any() else 1.0)


def test_scores_of_real_predictions():
    expected = json.loads((shared("data", "davis_predictions") / "expected.json").read_text())["results"]
    truth, results = shared("data", "davis2016", "Annotations", "480p"), shared("data", "davis_predictions", "osvos")
    for name in ("car-shadow", "dog"):
        paths = sorted((truth / name).glob("*.png"))
        pairs = [(read_labels(path), read_labels(results / name / path.name)) for path in paths]
        scores = vos.sequence_scores(pairs, 1)
        assert scores.j.mean() == pytest.approx(expected[name]["J_all_frames"], abs=1e-12)
        assert scores.f.mean() == pytest.approx(expected[name]["F_all_frames"], abs=1e-12)
        assert scores.j[:, 1:-1].mean() == pytest.approx(expected[name]["J_mean"], abs=1e-12)
        assert scores.f[:, 1:-1].mean() == pytest.approx(expected[name]["F_mean"], abs=1e-12)


def test_statistics_of_a_long_curve_are_right_unless_strict():
    curve = np.linspace(1, 0, 400)
    assert vos.statistics(curve).decay == pytest.approx(0.75, abs=0.01)
    assert vos.statistics(curve, strict=True).decay != pytest.approx(0.75, abs=0.1)


def test_totals_average_objects_not_sequences():
    one, three = vos.Scores(np.ones((1, 4)), np.ones((1, 4))), vos.Scores(np.zeros((3, 4)), np.zeros((3, 4)))
    assert vos.totals({"a": one, "b": three})["J&F-Mean"] == 0.25


def test_bad_input():
    label = np.ones((4, 4), np.uint8)
    with pytest.raises(PyvsegError, match="4x4.*5x4"):
        vos.sequence_scores([(np.ones((4, 5), np.uint8), label)], 1)
    with pytest.raises(PyvsegError, match="object id 2"):
        vos.sequence_scores([(label, 2 * label)], 1)
    with pytest.raises(PyvsegError, match="three frames"):
        vos.sequence_scores([], 1)
    with pytest.raises(PyvsegError, match="proposal id 21"):
        vos.unsupervised_scores(label[None], 21 * label[None])
