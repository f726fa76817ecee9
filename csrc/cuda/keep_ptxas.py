# SPDX-License-Identifier: Apache-2.0
"""Compiler launcher of the CUDA files: keeps what `ptxas -v` says of registers and spills as OBJECT.ptxas beside the object."""

import subprocess
import sys

command = sys.argv[1:]
done = subprocess.run([*command, "-Xptxas", "-v"], stderr=subprocess.PIPE, text=True, errors="replace", check=False)
lines = done.stderr.splitlines(keepends=True)
about_kernels = [line for line in lines if line.startswith("ptxas info") or "bytes stack frame" in line]
if "-o" in command:
    with open(f"{command[command.index('-o') + 1]}.ptxas", "w") as file:
        file.writelines(about_kernels)
sys.stderr.writelines(line for line in lines if line not in about_kernels)
sys.exit(done.returncode)
