# SPDX-License-Identifier: Apache-2.0
"""The rule that op tests hold results to: an error against float64 of at most twice that of the same-dtype reference."""

import torch
from torch import Tensor


def assert_as_exact(result: Tensor, reference: Tensor, exact: Tensor, what: str = "result") -> None:
    """`exact` is the float64 result; `reference` the PyTorch formula run in `result`'s dtype.

    A last bit of the dtype at the result's scale is granted on top, for references that happen to be exact.
    """
    assert result.dtype == reference.dtype and result.shape == exact.shape
    if exact.numel() == 0:
        return
    error = (result.double() - exact).abs().max().item()
    allowed = 2 * (reference.double() - exact).abs().max().item() + torch.finfo(result.dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g} against float64, allowed {allowed:.3g}"
