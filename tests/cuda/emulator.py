# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels without a GPU.

`csrc/cuda/*.cu` is compiled by the C++ compiler against emulate.h, where each CUDA thread is a fiber, into a library whose
ops are `torch.ops.pyvseg_emulated.<op>`: same schema, fake and gradient as `pyvseg::<op>`, on CPU tensors. It needs the
headers of the CUDA toolkit, not nvcc. Only what is computed is tested this way: speed, and what PTX or tensor cores would
do, are a GPU's matter. Objects are cached by the hash of their sources under build/emulated.
"""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pyvseg.ops import _dispatch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def cuda_headers() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parents[1]))
    found = [Path(home) / "include" for home in homes if home and (Path(home) / "include/cuda_bf16.h").exists()]
    return found[0] if found else None


def unavailable() -> str:
    """Why the emulator cannot be built here; empty when it can."""
    if _dispatch.extension is None:
        return "the extension, which declares the ops, is not compiled"
    if shutil.which("g++") is None:
        return "g++ is not installed"
    return "" if cuda_headers() else "the CUDA toolkit's headers are not here"


def compile_library(name: str, sources: list[Path]) -> Path:
    """The emulated library of these .cu files; compiles only what has changed."""
    flags = os.environ.get("PYVSEG_EMULATE_FLAGS", "").split()
    folder = ROOT / "build" / "emulated" / (f"{name}-{_hash(' '.join(flags))}" if flags else name)
    folder.mkdir(parents=True, exist_ok=True)
    torch_root = Path(torch.__file__).parent
    command = [
        *("g++", "-std=gnu++17", "-O1", "-g1", "-fPIC", "-w", "-fno-strict-aliasing", "-fvisibility=hidden", *flags),
        *("-DPYVSEG_EMULATE", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", '-DPYVSEG_CUDA_FACTS="emulated"'),
        *(f"-I{ROOT / 'csrc/cuda'}", f"-I{HERE}", "-isystem", str(cuda_headers()), "-isystem", f"{torch_root}/include"),
    ]
    headers = sorted([*HERE.glob("*.h"), *ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.cuh"), *ROOT.glob("csrc/cuda/*.h")])
    common = "\n".join([*command, torch.__version__, *(h.read_text() for h in headers)])

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}-{_hash(common + source.read_text())}.o"
        if not target.exists():
            for old in folder.glob(f"{source.stem}-*.o"):
                old.unlink()
            _run([*command, "-x", "c++", "-c", str(source), "-o", f"{target}.new"])
            os.replace(f"{target}.new", target)
        return target

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        library = folder / f"emulated-{_hash(' '.join(o.name for o in objects))}.so"
        if not library.exists():
            for old in folder.glob("emulated-*.so"):
                old.unlink()
            link = [f"-L{torch_root}/lib", "-ltorch_cpu", f"-Wl,-rpath,{torch_root}/lib"]
            _run(["g++", "-shared", *flags, *map(str, objects), *link, "-o", f"{library}.new"])
            os.replace(f"{library}.new", library)
    return library


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _run(command: list[str]) -> None:
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # no sanitizer in the compiler
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@functools.cache
def load() -> torch.library.Library:
    """Makes `torch.ops.pyvseg_emulated` hold every op of csrc/cuda."""
    library = compile_library("csrc", sorted(ROOT.glob("csrc/cuda/*.cu")))
    declared = _dispatch.add_library("pyvseg_emulated")
    torch.ops.load_library(library)
    return declared  # the ops live as long as it does
