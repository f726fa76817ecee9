# SPDX-License-Identifier: Apache-2.0
"""The leading query of every pixel of two 720p frames, from the stride-4 mask logits of Video-kMaX at 897 x 1601."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case
from pyvseg.ops import Resampling, mask_winners

PADDED, RESIZED, SOURCE, CELLS = (897, 1601), (897, 1595), (720, 1280), (225, 401)


def published(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As Video-kMaX computes it: all queries at full size, in float64; here frame by frame, for memory."""
    index, probability = [], []
    for frame in logits.split(1):
        full = F.interpolate(frame, PADDED, mode="bilinear", align_corners=True)[..., : RESIZED[0], : RESIZED[1]]
        full = F.interpolate(full, SOURCE, mode="bilinear", align_corners=True).double()
        index.append(full.argmax(1))
        probability.append(full.softmax(1).amax(1))
    return torch.cat(index), torch.cat(probability)


def cases(quick: bool) -> Iterator[Case]:
    axes = [Resampling.bilinear(c, p, True).cut(r).then(Resampling.bilinear(r, s, True)) for c, p, r, s in zip(CELLS, PADDED, RESIZED, SOURCE)]
    for queries, spread in ((40, 10.0), (128, 10.0), (128, 0.5)):
        coarse = spread * torch.randn(2, queries, CELLS[0] // 12, CELLS[1] // 12)
        logits = F.interpolate(coarse, CELLS, mode="bicubic")
        ways = {"published": lambda x=logits: published(x), "pyvseg": lambda x=logits: mask_winners(x, *axes)}
        pixels = 2 * SOURCE[0] * SOURCE[1]
        yield Case(
            "mask_winners", f"{queries} queries, {'clear' if spread > 1 else 'unsure'}", ways, bytes=logits.nbytes + 6 * pixels,
            flops=pixels * queries * 10, bars={("pyvseg", "published"): 10.0},
        )  # fmt: skip
        if quick:
            return
