#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the fuzz of the ops, and all tests of the emulated CUDA kernels, under AddressSanitizer and UBSan: tests/sanitize.sh [PYTEST ARGS]
# Builds in build/sanitize, beside the usual build. The sanitizers come first into a Python that knows nothing of them.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- tests/ops -k "fuzz or cuda-emulated"
tree=build/sanitize
value() { python -c "import pybind11, sys, torch; from pathlib import Path; print($1)"; }
mkdir -p $tree
exec 9>$tree/lock
flock 9
cmake -S . -B $tree -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Release -DPYVSEG_SANITIZE=ON \
  -DPython_EXECUTABLE="$(value sys.executable)" -Dpybind11_DIR="$(value 'pybind11.get_cmake_dir()')" \
  -DTORCH_ROOT="$(value 'Path(torch.__file__).parent')" -DTORCH_VERSION="$(value torch.__version__)"
cmake --build $tree ${MAX_JOBS:+-j $MAX_JOBS} -- --quiet

library() { "${CXX:-g++}" -print-file-name="$1"; }
# Leaks: Python and torch keep what they have until the process ends.
env LD_PRELOAD="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1 \
  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  PYVSEG_TEST_EXTENSION="$PWD/$tree/_C.so" \
  PYVSEG_EMULATE_FLAGS="-O0 -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined" \
  python -m pytest -q -s -p no:cacheprovider "$@"
