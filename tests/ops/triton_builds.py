# SPDX-License-Identifier: Apache-2.0
"""Compiles Triton kernels to GPU code on a machine without a GPU: what the interpreter runs may still not compile.

    assert_builds("from pyvseg.kernels import memory_read as m; m.memory_read(...)", capability=90)

runs the launchers on CPU tensors in a process of its own, where every launch compiles and none runs. Results are
whatever `empty` holds, so the code must call launchers only, not look at what they return.
"""

import os
import subprocess
import sys

_PRELUDE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Target:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[1]), 32)

triton.runtime.driver.set_active(Target())
run, built = JITFunction.run, set()
def only_compile(self, *args, grid, warmup, **kwargs):
    built.add(self.fn.__name__)
    return run(self, *args, grid=grid, warmup=True, **kwargs)
JITFunction.run = only_compile
"""


def assert_builds(code: str, capability: int) -> set[str]:
    """The names of the kernels that were compiled."""
    code = _PRELUDE + code + "\nprint(*built)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(capability)], capture_output=True, text=True, check=False, env=os.environ | {"TRITON_INTERPRET": "0"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return set(done.stdout.split())
