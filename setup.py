# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled kernels with CMake and ninja; everything else about the package stands in pyproject.toml.

PYVSEG_CUDA=0 leaves the CUDA library out, PYVSEG_CUDA=1 insists on it; by default it is built wherever nvcc is found.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_nvcc() -> str | None:
    wish = os.environ.get("PYVSEG_CUDA", "")
    if wish == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home] + [os.environ.get("PATH", "")]
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(places))
    if wish == "1" and nvcc is None:
        sys.exit("pyvseg: PYVSEG_CUDA=1 but nvcc was not found; put it on PATH or set CUDACXX")
    return nvcc


NVCC = find_nvcc()


class CMakeBuild(build_ext):
    """Configures and builds all extensions in one CMake tree that stays in build/, so that a second build is quick."""

    def run(self) -> None:
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                sys.exit(f"pyvseg: building needs {tool}, which was not found; `pip install {tool}` and try again")
        import pybind11
        import torch

        tree = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_ROOT": Path(torch.__file__).parent,
            "TORCH_VERSION": torch.__version__,
            "PYVSEG_NVCC": NVCC or "",
        }
        configure = ["cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja"]
        tree.mkdir(parents=True, exist_ok=True)
        with open(tree / "lock", "w") as lock:  # two installations at once would write over each other's files
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.call(configure + [f"-D{name}={value}" for name, value in options.items()], "configuring")
            self.call(["cmake", "--build", str(tree), *self.jobs()], "compiling")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # A new file rather than a rewritten one: a running process keeps the library that it has mapped.
            target.unlink(missing_ok=True)
            shutil.copy2(tree / f"{extension.name.rsplit('.', 1)[-1]}.so", target)

    def jobs(self) -> list[str]:
        jobs = os.environ.get("MAX_JOBS")
        return ["-j", jobs] if jobs else []

    def call(self, command: list[str], doing: str) -> None:
        if subprocess.call(command):
            sys.exit(f"pyvseg: {doing} the kernels failed (output above); a C++17 compiler and Python's headers are needed")


names = ["pyvseg._C"] + (["pyvseg._C_cuda"] if NVCC else [])
setup(
    packages=[*find_packages(include=["pyvseg", "pyvseg.*"]), "pyvseg.kernels"],
    package_dir={"pyvseg.kernels": "kernels"},
    ext_modules=[Extension(name, sources=[]) for name in names],
    cmdclass={"build_ext": CMakeBuild},
)
