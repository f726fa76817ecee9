# SPDX-License-Identifier: Apache-2.0
"""The numbers are those of the stored case, see tests/verify; here is what it does not reach."""

import numpy as np
import pytest

from pyvseg.errors import PyvsegError
from pyvseg.metrics import dvps

MAP = np.repeat([[130001, 20000]], 4, 0).repeat(3, 1)  # class 13, instance 1, and class 2
DEPTH = np.full(MAP.shape, 10, np.float32)


def count(metric, frames=2, truth=MAP, result=MAP, truth_depth=DEPTH, result_depth=DEPTH):
    for _ in range(frames):
        metric.update(truth, result, truth_depth, result_depth)
    return metric


def test_depth_that_is_wrong_or_missing():
    half = DEPTH.copy()
    half[:, :3] = 13  # thirty percent too far where class 13 is
    unmeasured = np.where(half > 10, np.float32(0), DEPTH)
    for truth_depth, expected in ((DEPTH, (1, 1, 0, 0)), (unmeasured, (1, 1, 1, 1))):
        counts = count(dvps.VideoDVPQ(19), truth_depth=truth_depth, result_depth=half).counts
        assert counts.shape == (4, 4, 19, 4)
        assert counts[:, 0, 13, 1].tolist() == [2 * hits for hits in expected] and counts[:, 1, 13, 1].tolist() == list(expected)
        assert (counts[:, 0, 2, 1] == 2).all() and not counts[:, 2].any()
    numbers = dvps.dstq([count(dvps.SequenceDSTQ(19, (13,)), result_depth=half).counts()])
    assert numbers["STQ"] == 1 and numbers["DQ by ratio"] == [0.5, 0.5] and numbers["DSTQ"] == pytest.approx(0.5 ** (1 / 3))


def test_nothing_measured():
    none = DEPTH * 0
    assert np.isnan(list(dvps.depth_errors(none, DEPTH).values())).all()
    assert dvps.dstq([count(dvps.SequenceDSTQ(19, (13,)), truth_depth=none).counts()])["DQ"] == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"result": MAP[:3]}, "the result is 6x3, its annotation 6x4"),
        ({"result_depth": DEPTH[:3]}, "are 6x3, 6x4, 6x4; they must have the same size"),
        ({"result": MAP + 10_000_000}, "the result holds ids from 10020000 to 10130001; an id is class"),
        ({"truth": MAP - 20001}, "the annotation holds ids from -1 to"),
        ({"result": MAP + 80000}, "the result.* class 21"),
    ],
)
def test_frames_that_do_not_fit(change, message):
    for metric in (dvps.VideoDVPQ(19, thresholds=(float("inf"),)), dvps.SequenceDSTQ(19, (13,))):
        with pytest.raises(PyvsegError, match=message):
            count(metric, **change)
