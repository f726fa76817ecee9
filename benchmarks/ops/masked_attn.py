# SPDX-License-Identifier: Apache-2.0
"""The masked attention of Mask2Former's decoder: 100 queries over the maps of an image at 384 x 640."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case, on_gpu
from pyvseg.ops import masked_attn

QUERIES, WIDTH, HEADS, FRAMES = 100, 256, 8, 4


def published(query: Tensor, key: Tensor, value: Tensor, masks: Tensor) -> Tensor:
    """`nn.MultiheadAttention` between its projections: one boolean mask for each head."""
    closed = (masks.sigmoid() < 0.5)[:, None].expand(-1, HEADS, -1, -1)
    closed = closed & ~closed.all(-1, keepdim=True)
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, value))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(closed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def cases(quick: bool) -> Iterator[Case]:
    if on_gpu():
        return  # PyTorch's own serves there
    for dtype in (torch.float32, torch.bfloat16):
        for height, width, share in ((48, 80, 1.0), (48, 80, 0.1), (24, 40, 0.3)):
            M = height * width
            tensors = [torch.randn(FRAMES, n, WIDTH).to(dtype) for n in (QUERIES, M, M)]
            first = (torch.rand(FRAMES, QUERIES, 1) * (1 - share) * M).floor()
            place = torch.arange(M)
            masks = torch.where((place >= first) & (place < first + share * M), 1.0, -1.0).to(dtype)
            ways = {
                "published": torch.inference_mode()(lambda t=(*tensors, masks): published(*t)),
                "pyvseg, reference (SDPA)": torch.inference_mode()(lambda t=(*tensors, masks): masked_attn(*t, HEADS, backend="reference")),
                "pyvseg": torch.inference_mode()(lambda t=(*tensors, masks): masked_attn(*t, HEADS)),
            }
            size = sum(t.nbytes for t in (*tensors, masks, tensors[0]))
            name = f"{FRAMES} x {height} x {width}, masks of {share:.0%}, {str(dtype)[6:]}"
            bars = {("pyvseg", "published"): 5.0, ("pyvseg", "pyvseg, reference (SDPA)"): 1.5}
            yield Case("masked_attn", name, ways, size, 4.0 * FRAMES * QUERIES * M * WIDTH * share, dtype, bars)
            if quick:
                break
