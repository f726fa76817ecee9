# SPDX-License-Identifier: Apache-2.0
"""The masked kernel update at stride 8: 100 thing kernels and the stuff kernels of COCO (153), Cityscapes (111) and VIPSeg
(166) at 480p, on KITTI-STEP and at 720p, with masks of a few per cent as networks give them and dense ones.

FLOP count the additions of the set pixels only. Nobody else offers the operation; its published form is K-Net's.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, on_gpu
from pyvseg.ops import KernelUpdator, kernel_update, mask_pool

C = 256


def blobs(B: int, N: int, size: tuple[int, int], density: float) -> Tensor:
    """Logits of smooth masks, each with that share of its pixels on."""
    coarse = torch.randn(B * N, 1, max(size[0] // 8, 2), max(size[1] // 8, 2))
    flat = F.interpolate(coarse, size=size, mode="bicubic").flatten(1)
    level = flat.kthvalue(max(round((1 - density) * flat.shape[1]), 1), dim=1, keepdim=True).values
    return (flat - level + (1e3 if density == 1 else 0)).reshape(B, N, *size)


def published(masks: Tensor, features: Tensor) -> Tensor:
    gathered = (masks.sigmoid() > 0.5).to(features.dtype)
    return torch.einsum("bnhw,bchw->bnc", gathered, features)


def published_update(masks: Tensor, features: Tensor, kernels: Tensor, u: KernelUpdator) -> Tensor:
    """Pooling, then the updator layer by layer."""
    pooled_in, pooled_out = u.dynamic_layer(published(masks, features)).chunk(2, -1)
    kernel_in, kernel_out = u.input_layer(kernels).chunk(2, -1)
    both = kernel_in * pooled_in
    input_gate, update_gate = u.input_norm_in(u.input_gate(both)).sigmoid(), u.norm_in(u.update_gate(both)).sigmoid()
    mixed = update_gate * u.norm_out(pooled_out) + input_gate * u.input_norm_out(kernel_out)
    return u.fc_norm(u.fc_layer(mixed)).relu()


def with_backward(function, leaves: list[Tensor]):
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        function().sum().backward()

    return run


def name_of(what: str, B: int, N: int, size: tuple[int, int], density: float, dtype: torch.dtype) -> str:
    frames = f"{B} frames of " if B > 1 else ""
    return f"{what}, {frames}{N} masks, {size[0]} x {size[1]}, {density:.0%} on, {str(dtype).removeprefix('torch.')}"


def pool(B: int, N: int, size: tuple[int, int], density: float, dtype: torch.dtype, bar: float, quick: bool, backward: bool = False) -> Case:
    masks, features = blobs(B, N, size, density).to(dtype), torch.randn(B, C, *size).to(dtype)
    last = features.contiguous(memory_format=torch.channels_last)
    leaves = [t.requires_grad_(backward) for t in (features, last)]
    ways = {
        "published": lambda: published(masks, features),
        "published, channels last": lambda: published(masks, last),
        "product with (masks > 0)": lambda: (masks > 0).to(dtype).flatten(2) @ features.flatten(2).mT,
        "pyvseg": lambda: mask_pool(masks, features),
        "pyvseg, channels last": lambda: mask_pool(masks, last),
    }
    if backward:
        ways = {way: with_backward(run, leaves) for way, run in ways.items()}
    elif not quick:
        compiled = torch.compile(published, dynamic=False)
        ways["published, torch.compile"] = lambda: compiled(masks, features)
    bars = {("pyvseg", "published"): bar, ("pyvseg, channels last", "published, channels last"): bar}
    times = 2 if backward else 1  # masks and features twice, their gradient instead of the result
    bytes = times * (masks.element_size() * (masks.numel() + features.numel())) + 4 * B * N * C
    name = name_of("pooling" + (", forward and backward" if backward else ""), B, N, size, density, dtype)
    return Case("kernel_update", name, ways, bytes, times * float((masks > 0).sum()) * C, dtype, bars)


def update(B: int, N: int, size: tuple[int, int], density: float, dtype: torch.dtype, bar: float, quick: bool, backward: bool = False) -> Case:
    masks, features, kernels = blobs(B, N, size, density).to(dtype), torch.randn(B, C, *size).to(dtype), torch.randn(B, N, C).to(dtype)
    updator = KernelUpdator(C).to(dtype)
    leaves = [features.requires_grad_(backward), kernels.requires_grad_(backward), *updator.requires_grad_(backward).parameters()]
    ways = {
        "published": lambda: published_update(masks, features, kernels, updator),
        "pyvseg": lambda: kernel_update(masks, features, kernels, updator),
    }
    if backward:
        ways = {way: with_backward(run, leaves) for way, run in ways.items()}
    else:
        pooled = mask_pool(masks, features)
        ways["pyvseg, update alone"] = lambda: updator(pooled, kernels)
        if not quick:
            compiled = torch.compile(published_update, dynamic=False)
            ways["published, torch.compile"] = lambda: compiled(masks, features, kernels, updator)
    size_of = masks.element_size()
    bytes = size_of * (masks.numel() + features.numel() + 2 * kernels.numel() + 7 * C * C) * (2 if backward else 1)
    linears = 2.0 * B * N * 7 * C * C
    flops = (linears + float((masks > 0).sum()) * C) * (3 if backward else 1)
    name = name_of("pooling and update" + (", forward and backward" if backward else ""), B, N, size, density, dtype)
    return Case("kernel_update", name, ways, bytes, flops, dtype, {("pyvseg", "published"): bar})


SMALL, TALL = (60, 108), (90, 160)


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for density, bar in ((0.08, 5), (0.5, 1), (1.0, 1)):
            yield pool(1, 153, SMALL, density, dtype, bar, quick)
        yield update(1, 153, SMALL, 0.08, dtype, 2, quick)
    yield pool(1, 153, SMALL, 0.08, torch.float32, 5, quick, backward=True)
    yield update(1, 153, SMALL, 0.08, torch.float32, 2, quick, backward=True)
    if quick:
        return
    for N, size in ((111, (60, 107)), (166, (45, 80)), (117, (48, 156)), (153, TALL)):
        yield pool(1, N, size, 0.08, torch.float32, 5, True)
    yield pool(5, 153, SMALL, 0.08, torch.float32, 5, True)
    yield pool(1, 153, SMALL, 1.0, torch.float32, 1, True, backward=True)
    for dtype in (torch.float32, torch.bfloat16):
        yield update(1, 153, TALL, 0.08, dtype, 2, True)
    if on_gpu():
        for B, size in ((1, TALL), (1, (135, 240)), (4, SMALL), (16, SMALL)):
            yield pool(B, 153, size, 0.08, torch.bfloat16, 5, True)
