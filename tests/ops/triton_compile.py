# SPDX-License-Identifier: Apache-2.0
"""Compiles Triton kernels for a GPU that is not there: `python -m tests.ops.triton_compile 90 [FILE...]`, as JSON.

The interpreter accepts what the compiler refuses. Here the launchers of pyvseg/kernels run on CPU tensors with a driver
that only names its target: every launch ends after ptxas. Results are whatever `empty` holds, so that `CALLS` must not look
at them. It needs its own process, in which Triton does not interpret.
"""

import importlib
import json
import re
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


class Target:
    """A driver without a GPU."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def conv_end(kernels: ModuleType) -> None:
    bias = torch.zeros(70)
    for dtype in (FLOAT, BF16):
        maps = torch.zeros(2, 70, 9, 11, dtype=dtype).contiguous(memory_format=torch.channels_last)
        kernels.conv_end(maps, bias.to(dtype), maps, True)
        kernels.conv_end(maps, bias.to(dtype), None, False)
        kernels.conv_end(maps, None, maps, False)


def kernel_update(kernels: ModuleType) -> None:
    C = 256
    for dtype in (FLOAT, BF16):
        masks, features, rows = torch.randn(1, 100, 6480).to(dtype), torch.randn(1, C, 6480).to(dtype), torch.randn(100, C).to(dtype)
        kernels.mask_pool(masks, features)
        kernels.mask_pool_backward(torch.randn(1, 100, C), masks, dtype, False)
        shapes = [(2 * C, C), (2 * C,)] * 2 + [(C, C), (C,)] * 3 + [(C,)] * 10
        parameters = [torch.randn(shape).to(dtype) for shape in shapes]
        _, state = kernels.kernel_update(rows.float(), rows, parameters, 1e-5)
        kernels.kernel_update_backward(rows, rows.float(), rows, parameters, state, 1e-5)


def kmeans_attn(kernels: ModuleType) -> None:
    one = torch.ones(1)
    for dtype in (FLOAT, BF16):
        pixel, clusters, value = (torch.zeros(shape, dtype=dtype) for shape in ((1, 128, 12840), (1, 128, 128), (1, 256, 12840)))
        kernels.kmeans_attn(pixel, clusters, value, one, one, True)
    kernels.kmeans_assign(torch.zeros(1, 128, 128))
    kernels.kmeans_gather(torch.zeros(1, 128, 256), torch.zeros(1, 128, dtype=torch.int32))


def mask_cost(kernels: ModuleType) -> None:
    for dtype, targets in ((FLOAT, torch.bool), (BF16, BF16)):
        logits, targets = torch.randn(100, 12544).to(dtype), torch.zeros(20, 12544, dtype=targets)
        kernels.mask_cost(logits, targets)
        kernels.mask_cost_backward(torch.randn(100, 20), torch.randn(100, 20), torch.randn(100), logits, targets)


def mask_iou(kernels: ModuleType) -> None:
    for dtype in (torch.bool, FLOAT, BF16):
        bits = kernels.pack_masks(torch.zeros(100, 25680, dtype=dtype))
    kernels.mask_iou(bits, bits)


def mask_winners(kernels: ModuleType) -> None:
    first, weights = torch.zeros(97, dtype=torch.int32), torch.zeros(97, 3)
    for best in (1, 2):
        kernels.mask_winners(torch.zeros(2, 100, 29, 51), first, weights, first[:65], weights[:65, :2], best)


def memory_match(kernels: ModuleType) -> None:
    labels = torch.zeros(1, 100, dtype=torch.int64)
    for dtype, given in ((FLOAT, None), (BF16, labels)):
        kernels.memory_match(torch.randn(1, 100, 256).to(dtype), torch.randn(1, 100, 256).to(dtype), given, given)


def memory_read(kernels: ModuleType) -> None:
    """For both forms of the similarity; 1 as a size is a constant to Triton."""
    for dtype, B, N, M, O, CK, CV, k, dot in (
        (BF16, 1, 96, 32, 3, 64, 512, 50, False), (HALF, 2, 97, 5, 1, 33, 7, 5, True), (FLOAT, 1, 1, 1, 1, 1, 1, 1, False),
    ):  # fmt: skip
        key, value, query = torch.randn(B, N, CK).to(dtype), torch.randn(B, O, N, CV).to(dtype), torch.randn(B, M, CK).to(dtype)
        out, _, _ = kernels.memory_read(key, value, query, k, dot)
        index, weight = torch.zeros(B, M, k, dtype=torch.int32), torch.zeros(B, M, k)
        kernels.memory_read_backward(torch.zeros_like(out), key, value, query, index, weight, dot)


def ms_deform_attn(kernels: ModuleType) -> None:
    shapes = [3, 16, 2, 1]
    value, grad, reference = torch.randn(1, 50, 2, 32), torch.randn(1, 5, 64), torch.rand(1, 5, 2, 4)
    locations, weights = torch.rand(1, 5, 2, 2, 4, 2), torch.rand(1, 5, 2, 2, 4)
    kernels.ms_deform_attn(value, shapes, locations, weights)
    kernels.ms_deform_attn_backward(grad, value, shapes, locations, weights, False)
    value, grad = value.bfloat16(), grad.bfloat16()
    kernels.ms_deform_attn_fused(value, shapes, reference, locations, weights)
    kernels.ms_deform_attn_fused_backward(grad, value, shapes, reference[..., :2], locations, weights, True)


def point_sample(kernels: ModuleType) -> None:
    for dtype in (torch.bool, BF16):
        kernels.point_sample(torch.zeros(100, 1, 120, 214, dtype=dtype), torch.rand(1, 12544, 2))
    kernels.point_sample_backward(torch.zeros(100, 1, 12544, dtype=BF16), torch.rand(1, 12544, 2), 120, 214)


CALLS: dict[str, Callable[[ModuleType], None]] = {
    call.__name__: call for call in (conv_end, kernel_update, kmeans_attn, mask_cost, mask_iou, mask_winners, memory_match, memory_read, ms_deform_attn, point_sample)
}


def launched(module: ModuleType) -> set[str]:
    """The kernels of a file that no other one calls: those that the host launches."""
    own = {name: x.src for name, x in vars(module).items() if isinstance(x, jit.JITFunction) and x.fn.__module__ == module.__name__}
    return {name for name in own if not any(re.search(rf"\b{name}\(", source) for other, source in own.items() if other != name)}


def main(capability: str, *files: str) -> None:
    driver.set_active(Target(int(capability)))
    compiled = []
    run = jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    jit.JITFunction.run = compile_only
    result = {}
    for file in files or CALLS:
        compiled.clear()
        module = importlib.import_module(f"pyvseg.kernels.{file}")
        CALLS[file](module)
        shared = {kernel.metadata.name: 0 for kernel in compiled}
        for kernel in compiled:
            assert kernel.asm["cubin"]
            shared[kernel.metadata.name] = max(shared[kernel.metadata.name], kernel.metadata.shared)
        result[file] = {"shared": shared, "left": sorted(launched(module) - shared.keys())}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
