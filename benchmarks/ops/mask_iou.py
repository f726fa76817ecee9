# SPDX-License-Identifier: Apache-2.0
"""Hundred by hundred masks of a clip of five frames at 120 x 214 (480p at stride 4), as when queries are matched or
duplicates removed; on a GPU at 720p and 1080p too, and sixteen frames."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Case, on_gpu
from pyvseg.ops import mask_iou, pack_masks

SIZE = (5, 120, 214)
GPU_BAR = 5.0  # times eager PyTorch


def blobs(n: int, size: tuple[int, int, int] = SIZE) -> Tensor:
    """Logits of masks as a network gives them: smooth, a tenth of the area on."""
    coarse = torch.randn(n, size[0], 8, 14) - 1.0
    return torch.nn.functional.interpolate(coarse, size=size[1:], mode="bicubic").contiguous()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """IoU by a float matrix product, as Mask2Former-like trackers compute it; a, b (N, P) bool."""
    a, b = a.float(), b.float()
    intersection = a @ b.T
    return intersection / (a.sum(1)[:, None] + b.sum(1) - intersection).clamp(min=1)


def by_coco(a: Tensor, b: Tensor) -> np.ndarray:
    """Run lengths of each tube as one tall image; a, b (N, T, H, W) bool."""
    from pycocotools import mask as coco

    def encode(masks: Tensor) -> list[dict]:
        tall = masks.flatten(1, 2).to(torch.uint8).numpy()
        return coco.encode(np.asfortranarray(tall.transpose(1, 2, 0)))

    return coco.iou(encode(a), encode(b), [0] * len(b))


def case(n: int, m: int, quick: bool, size: tuple[int, int, int] = SIZE) -> Case:
    a, b = blobs(n, size), blobs(m, size)
    ways = {
        "float matmul from logits": lambda: matmul((a > 0).flatten(1), (b > 0).flatten(1)),
        "float matmul from bool": lambda x=(a > 0).flatten(1), y=(b > 0).flatten(1): matmul(x, y),
        "pycocotools from logits": lambda: by_coco(a > 0, b > 0),
        "pyvseg from logits": lambda: mask_iou(pack_masks(a), pack_masks(b)),
        "pyvseg from bool": lambda x=a > 0, y=b > 0: mask_iou(x, y),
        "pyvseg from bits": lambda x=pack_masks(a), y=pack_masks(b): mask_iou(x, y),
    }
    if not quick:
        compiled = torch.compile(lambda a, b: matmul((a > 0).flatten(1), (b > 0).flatten(1)), dynamic=False)
        ways["float matmul, torch.compile"] = lambda: compiled(a, b)
    bars = {
        ("pyvseg from logits", "float matmul from logits"): 12,
        ("pyvseg from logits", "pycocotools from logits"): 12,
        ("pyvseg from bits", "float matmul from logits"): 35,
    }
    if on_gpu():
        del ways["pycocotools from logits"]  # on the host only
        bars = {("pyvseg from logits", "float matmul from logits"): GPU_BAR}
    P = a[0].numel()
    elements = float((n + m) * P)
    from_bool = {"float matmul from bool": elements, "pyvseg from bool": elements, "pyvseg from bits": elements / 8}
    # flops: and, count and add of 64-bit words, which no unit of the machine but its vectors would do
    return Case("mask_iou", f"{n} x {m} masks of {size}", ways, 4 * elements, 3.0 * n * m * P / 64, bars=bars, way_bytes=from_bool)


def soft(n: int, m: int) -> Case:
    a, b = blobs(n).sigmoid().requires_grad_(), blobs(m).sigmoid().requires_grad_()

    def plain() -> Tensor:
        x, y = a.flatten(1), b.flatten(1)
        intersection = torch.einsum("np,mp->nm", x, y)
        return intersection / (x.sum(1)[:, None] + y.sum(1) - intersection)

    def run(function):
        a.grad = b.grad = None
        function().sum().backward()

    ways = {"einsum": lambda: run(plain), "pyvseg": lambda: run(lambda: mask_iou(a, b))}
    P = a[0].numel()
    return Case("mask_iou", f"soft, {n} x {m}, forward and backward", ways, 8.0 * (n + m) * P, 6.0 * n * m * P)


def cases(quick: bool) -> Iterator[Case]:
    yield case(100, 100, quick)
    yield soft(100, 20)
    if on_gpu():
        for size in ((5, 180, 320), (5, 270, 480), (16, 120, 214)):
            yield case(100, 100, True, size)
