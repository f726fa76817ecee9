# SPDX-License-Identifier: Apache-2.0
"""The k-means step of kMaX-like decoders: 128 clusters, values of 256 channels, the positions of two frames at stride 8.

Positions of one cluster lie together, as in an image. The published code takes this step in float32, so bfloat16 is held
against that on a CPU, and against the published step in bfloat16 on a GPU.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, on_gpu
from pyvseg.ops import kmeans_attn
from pyvseg.ops.kmeans_attn import reference

N, D, SCALE, BIAS = 128, 256, 1.3, -0.2
GPU_BAR = 5.0  # times eager PyTorch


def published(pixel: Tensor, clusters: Tensor, value: Tensor) -> Tensor:
    """As kMaX-DeepLab computes it: logits, maximum, a one-hot matrix, a second dense product."""
    logits = torch.einsum("bcm,bnc->bnm", pixel, clusters) * SCALE + BIAS
    index = logits.max(1, keepdim=True)[1]
    one_hot = torch.zeros_like(logits).scatter_(1, index, 1.0)
    return torch.einsum("bnm,bdm->bnd", one_hot, value)


def scattered(pixel: Tensor, clusters: Tensor, value: Tensor) -> Tensor:
    """The best that PyTorch has: channels last, argmax along rows, index_add of the values."""
    logits = torch.addmm(torch.tensor(BIAS, dtype=pixel.dtype), pixel[0].T, clusters[0].T, alpha=SCALE)
    return value.new_zeros(N, D).index_add_(0, logits.argmax(1), value[0].T)


def maps(frames: int, height: int, width: int, C: int) -> tuple[Tensor, Tensor, Tensor]:
    """pixel (1, C, M), clusters (1, N, C), value (1, D, M); twelve by twelve positions or so share a cluster."""
    clusters = torch.randn(1, N, C)
    coarse = torch.randint(0, N, (frames, 1, height // 12 + 1, width // 12 + 1)).float()
    assign = F.interpolate(coarse, size=(height, width)).flatten().long()
    pixel = F.normalize(clusters[0, assign] + torch.randn(len(assign), C)).T.contiguous()
    return pixel.unsqueeze(0), clusters, torch.randn(1, D, len(assign))


def last(t: Tensor) -> Tensor:
    """The same values with channels adjacent in memory."""
    return t.mT.contiguous().mT


def forward(frames: int, height: int, width: int, C: int, dtype: torch.dtype, quick: bool = True, bar: float | None = None) -> Case:
    args = maps(frames, height, width, C)
    ours = tuple(t.to(dtype) for t in args)
    rows = last(ours[0]), ours[1], last(ours[2])
    theirs, bar = (ours, GPU_BAR) if on_gpu() else (args, bar)
    terms = dict(scale=SCALE, bias=BIAS)
    ways = {
        "published": lambda: published(*theirs),
        "argmax, index_add, channels last": lambda: scattered(*rows),
        "pyvseg": lambda: kmeans_attn(*ours, **terms),
        "pyvseg, channels last": lambda: kmeans_attn(*rows, **terms),
        "pyvseg with logits": lambda: kmeans_attn(*ours, **terms, want_logits=True),
    }
    if not quick:
        scale, bias = torch.tensor([SCALE]), torch.tensor([BIAS])
        ways["pyvseg reference"] = lambda: reference(*ours, scale, bias, False)
        compiled = torch.compile(published, dynamic=False)
        ways["published, torch.compile"] = lambda: compiled(*theirs)
    M, size = args[0].shape[2], ours[0].element_size()
    traffic = float(size * (M * (C + D) + N * C) + 4 * (M + N * (D + 1)))
    with_logits = traffic + size * N * M
    name = f"{frames} x {height} x {width}, C={C}, {str(dtype).removeprefix('torch.')}"
    bars = {(way, "published"): bar for way in ("pyvseg", "pyvseg, channels last")} if bar else {}
    peak = torch.float32 if dtype == torch.float16 and not on_gpu() else dtype  # CPUs multiply float16 as float32
    return Case("kmeans_attn", name, ways, traffic, 2.0 * M * N * C + M * D, peak, bars, {"pyvseg with logits": with_logits})


def backward(frames: int, height: int, width: int, C: int) -> Case:
    pixel, clusters, value = maps(frames, height, width, C)
    value.requires_grad_()
    grad = torch.randn(1, N, D)

    def run(step):
        value.grad = None
        step().backward(grad)

    ways = {
        "published": lambda: run(lambda: published(pixel, clusters, value)),
        "pyvseg": lambda: run(lambda: kmeans_attn(pixel, clusters, value, scale=SCALE, bias=BIAS).update),
    }
    M = pixel.shape[2]
    name = f"{frames} x {height} x {width}, C={C}, forward and backward"
    bars = {("pyvseg", "published"): GPU_BAR if on_gpu() else 2.5}
    return Case("kmeans_attn", name, ways, 4.0 * (M * (C + 2 * D + 2) + N * (C + 2 * D)), 2.0 * M * N * C + M * D, bars=bars)


def cases(quick: bool) -> Iterator[Case]:
    """480 x 854, then 360 x 640, 720 x 1280, and 897 x 1601 at strides 8 and 4; on a GPU 1080p and clips too."""
    for dtype, bar in ((torch.float32, 2.5), (torch.bfloat16, 4.5)):
        for C in (128, 256):
            yield forward(2, 60, 107, C, dtype, quick, bar)
        if not quick:
            for height, width, C in ((45, 80, 256), (90, 160, 256), (113, 201, 128), (225, 401, 128)):
                yield forward(2, height, width, C, dtype, bar=bar)
    if not quick or on_gpu():
        yield forward(2, 60, 107, 256, torch.float16)
        yield backward(2, 60, 107, 128)
    if on_gpu():
        for frames, height, width in ((2, 135, 240), (4, 60, 107), (16, 60, 107)):
            yield forward(frames, height, width, 256, torch.bfloat16, bar=GPU_BAR)
