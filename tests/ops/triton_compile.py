# SPDX-License-Identifier: Apache-2.0
"""Compiles Triton kernels for a GPU that is not there: `python -m tests.ops.triton_compile 90 OP...`, as JSON.

The interpreter accepts what the compiler refuses. Here the launchers of pyvseg/kernels run on CPU tensors with a driver
that only names its target: every launch ends after ptxas. What to call stands in `CALLS`; it needs its own process, in
which Triton does not interpret.
"""

import importlib
import json
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit


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


def ms_deform_attn(kernels: ModuleType) -> None:
    shapes = [3, 16, 2, 1]
    value, grad, reference = torch.randn(1, 50, 2, 32), torch.randn(1, 5, 64), torch.rand(1, 5, 2, 4)
    locations, weights = torch.rand(1, 5, 2, 2, 4, 2), torch.rand(1, 5, 2, 2, 4)
    kernels.ms_deform_attn(value, shapes, locations, weights)
    kernels.ms_deform_attn_backward(grad, value, shapes, locations, weights, False)
    value, grad = value.bfloat16(), grad.bfloat16()
    kernels.ms_deform_attn_fused(value, shapes, reference, locations, weights)
    kernels.ms_deform_attn_fused_backward(grad, value, shapes, reference[..., :2], locations, weights, True)


CALLS: dict[str, Callable[[ModuleType], None]] = {"ms_deform_attn": ms_deform_attn}


def main(capability: str, *ops: str) -> None:
    driver.set_active(Target(int(capability)))
    compiled = []
    run = jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    jit.JITFunction.run = compile_only
    for op in ops:
        CALLS[op](importlib.import_module(f"pyvseg.kernels.{op}"))
    print(json.dumps([{"kernel": k.metadata.name, "shared": k.metadata.shared, "cubin": len(k.asm["cubin"])} for k in compiled]))


if __name__ == "__main__":
    main(*sys.argv[1:])
