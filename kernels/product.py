# SPDX-License-Identifier: Apache-2.0
"""Matrix products in tiles that are as exact as float32 and run on tensor cores; for kernels to call."""

import triton
import triton.language as tl

# Triton's interpreter keeps bfloat16 as bits, which its products do not understand.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total):
    """total + a @ b with float32 sums; a, b bfloat16 or float16."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def thirds(x):
    """A float32 as the sum of three bfloat16, largest first, exact but for what underflows."""
    high = x.to(tl.bfloat16)
    rest = tl.where(tl.abs(x) < float("inf"), x - high.to(tl.float32), 0.0)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def product(a, b, total):
    """total + a @ b; float32 takes six products of bfloat16, as exact as float32's own units and several times as fast."""
    if a.dtype == tl.float32:
        a_high, a_middle, a_low = thirds(a)
        b_high, b_middle, b_low = thirds(b)
        a_finite, b_finite = finite(a_high), finite(b_high)  # infinity times a third that is zero would be NaN
        total = dot(a_low, b_finite, total)
        total = dot(a_finite, b_low, total)
        total = dot(a_middle, b_middle, total)
        total = dot(a_middle, b_finite, total)
        total = dot(a_finite, b_middle, total)
        total = dot(a_high, b_high, total)
    else:
        total = dot(a, b, total)
    return total


@triton.jit
def finite(x):
    """bfloat16 with zeros for infinities and NaN."""
    wide = x.to(tl.float32)
    return tl.where(tl.abs(wide) < float("inf"), wide, 0.0).to(tl.bfloat16)
