# SPDX-License-Identifier: Apache-2.0
"""The leading queries of full-size pixels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyvseg.ops import MaskWinners, Resampling, mask_winners
from pyvseg.ops.mask_winners import reference
from tests.ops.implementations import implementations

bilinear = Resampling.bilinear


def logits_of(t, n, h, w, spread=3.0, seed=0):
    return spread * torch.randn(t, n, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "t, n, cells, size",
    [
        (2, 7, (5, 6), (33, 41)), (1, 128, (29, 51), (65, 97)), (1, 33, (40, 70), (13, 9)), (1, 2, (1, 1), (70, 130)),
        (3, 17, (6, 100), (3, 6)), (1, 16, (4, 4), (1, 1)),
    ],
)
@pytest.mark.parametrize("spread", [0.3, 40.0])
@pytest.mark.parametrize("best", [1, 2])
@pytest.mark.parametrize("implementation", implementations("mask_winners"), indirect=True)
def test_winners_are_those_of_the_whole_logits(implementation, t, n, cells, size, spread, best):  # fmt: skip
    if implementation.slow and n * size[0] * size[1] > 20_000:
        pytest.skip("many queries and pixels take the interpreter long")
    logits = logits_of(t, n, *cells, spread=spread)
    rows, columns = (bilinear(c, s, True) for c, s in zip(cells, size))
    exact = columns.apply(rows.apply(logits.double(), 2), 3)
    (placed,) = implementation.place(logits)
    found = MaskWinners(*(x.cpu() for x in mask_winners(placed, rows, columns, best, backend=implementation.backend)))
    top, order = exact.topk(min(best + 1, n), 1)
    share = (top - exact.logsumexp(1, keepdim=True)).exp()
    margin = 1e-5 * spread
    for k in range(best):
        torch.testing.assert_close(found.probability[k], share[:, k].float(), rtol=1e-4 * max(spread, 1), atol=1e-6)
        clear = torch.ones_like(share[:, 0], dtype=torch.bool)
        for a, b in ((k - 1, k), (k, k + 1)):
            if a >= 0 and b < top.shape[1]:
                clear &= top[:, a] - top[:, b] > margin
        visible = clear & (share[:, k] > 1e-9)
        assert clear.float().mean() > 0.9
        assert torch.equal(found.index[k][visible].long(), order[:, k][visible])


@pytest.mark.parametrize("implementation", implementations("mask_winners"), indirect=True)
def test_the_first_of_equal_queries_wins(implementation):
    (logits,) = implementation.place(torch.zeros(1, 40, 3, 3))
    logits[:, [5, 37]] = 2.0
    axis = bilinear(3, 50, False)
    for found in (mask_winners(logits, axis, axis, 2, backend=implementation.backend), reference(logits, axis, axis, 2)):
        assert (found[0][0] == 5).all() and (found[0][1] == 37).all()
        torch.testing.assert_close(found[1][0], found[1][1])


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("before, after", [(5, 33), (33, 5), (7, 7), (1, 9), (9, 1), (401, 1280)])
def test_resampling_is_interpolation(align, before, after):
    x = torch.randn(3, before)
    theirs = F.interpolate(x[:, None].double(), after, mode="linear", align_corners=align)[:, 0]
    torch.testing.assert_close(bilinear(before, after, align).apply(x.double(), 1), theirs, rtol=0, atol=3e-4)  # positions are float32


def test_two_resamplings_in_one():
    first, second = bilinear(12, 60, True).cut(47), bilinear(47, 31, True)
    x = torch.randn(2, 12, dtype=torch.float64)
    torch.testing.assert_close(first.then(second).apply(x, 1), second.apply(first.apply(x, 1), 1), rtol=0, atol=1e-6)
    part = slice(5, 9)
    assert torch.equal(second.apply(x.repeat(1, 4)[:, :47], 1)[:, part], second.apply(x.repeat(1, 4)[:, :47], 1, part))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logits": torch.zeros(1, 3, 4, 4, dtype=torch.int32)}, TypeError, "logits must be a floating-point"),
        ({"logits": torch.zeros(3, 4, 4)}, ValueError, "logits must be"),
        ({"logits": torch.zeros(1, 0, 4, 4)}, ValueError, "1 to 32767 queries"),
        ({"rows": bilinear(5, 9, True)}, ValueError, "rows must resample the logits' 4 positions"),
        ({"columns": (0, 1)}, TypeError, "columns must be a Resampling"),
        ({"best": 3}, ValueError, "best must be 1 or 2"),
        ({"logits": torch.zeros(1, 1, 4, 4), "best": 2}, ValueError, "best must be 1 or 2"),
    ],
)
def test_bad_input_is_named(change, error, message):
    axis = bilinear(4, 9, True)
    with pytest.raises(error, match=message):
        mask_winners(**{"logits": torch.zeros(1, 3, 4, 4), "rows": axis, "columns": axis, "best": 1} | change)


def test_opcheck():
    axis = bilinear(4, 9, True)
    taps = [torch.from_numpy(x) for x in (axis.first.astype(np.int32), axis.weights)]
    torch.library.opcheck(torch.ops.pyvseg.mask_winners.default, (logits_of(2, 5, 4, 4), *taps, *taps, 2))
