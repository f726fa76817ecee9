# SPDX-License-Identifier: Apache-2.0
"""The emulator runs kernels as CUDA says, and refuses what CUDA leaves undefined."""

import pytest
import torch

from tests.cuda import emulator


@pytest.fixture(scope="module")
def probe():
    if reason := emulator.unavailable():
        pytest.skip(f"no emulator: {reason}")
    torch.ops.load_library(emulator.compile_library("probe", [emulator.HERE / "probe.cu"]))
    return torch.ops.pyvseg_probe


@pytest.mark.parametrize("n", [0, 1, 255, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_warps_shared_memory_and_atomics(probe, n, dtype):
    x = torch.randn(n).to(dtype)
    sums, copy, positive = probe.square_sums(x)
    assert torch.equal(copy, x.float())
    torch.testing.assert_close(sums.sum(), x.float().square().sum())
    assert positive.item() == (x > 0).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wide_accesses(probe, dtype):
    x = torch.randn(64).to(dtype)
    assert torch.equal(probe.twice(x), 2 * x)


def test_warp_intrinsics(probe):
    out = probe.warp_words(torch.zeros(1))
    lane = torch.arange(32)
    first = lane // 8 * 8
    assert torch.equal(out[:, 0], torch.where(lane - 3 >= first, lane - 3, lane).int())
    assert torch.equal(out[:, 1], torch.where(lane + 3 < first + 8, lane + 3, lane).int())
    assert torch.equal(out[:, 2], (lane ^ 5).int())
    assert torch.equal(out[:, 3], (first + 1).int())
    assert torch.equal(out[:, 4], (lane < 16).int())
    same = (lane[:, None] % 3 == lane % 3).long() << lane
    assert torch.equal(out[:, 5].long() & 0xFFFFFFFF, same.sum(1))
    assert torch.equal(out[:, 6], torch.where(lane < 16, 15, 31).int())
    assert (out[:, 7] == 27).all()


@pytest.mark.parametrize(
    "which, message",
    [
        (0, r"cannot go on; threads from 0 wait at __syncthreads of .*probe.cu:\d+; threads from 7 wait at __syncthreads"),
        (1, "threads from 0 wait at __shfl_sync; threads from 7 wait at __syncthreads"),
        (2, "mask lacks the lane"),
        (4, "too few or many threads"),
        (5, "more shared memory"),
    ],
)
def test_misuse_is_an_error(probe, which, message):
    out = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        probe.misuse(out, which)
    assert probe.twice(torch.ones(64)).eq(2).all()  # and the next kernel runs


def test_missing_barrier_shows(probe):
    out = torch.zeros(1, dtype=torch.int32)
    probe.misuse(out, 3)
    assert out.item() != 128  # what a barrier would make of it
