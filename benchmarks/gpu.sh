#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash benchmarks/gpu.sh [OUT]: builds, tests and measures everything on a machine with a CUDA GPU, within 8 minutes.
# It needs torch >= 2.11 with CUDA, Triton, nvcc, cmake, ninja and pybind11; no network, no installation. OUT (by default
# benchmarks/results) receives <gpu>.json and <gpu>.md; pyvseg/ops/measured.json learns the fastest backends; commit all. A section that fails does not stop the next ones; the exit status
# is 1 if any failed. --dry-run goes through all sections on a machine without a GPU: CPU build, emulated tests, quick sizes.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="/usr/local/cuda/bin:$PATH" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3} FAILED=() DEVICE=cuda
[ "${1:-}" = --dry-run ] && { DEVICE=cpu; shift; }
LIMIT=${LIMIT:-$([ $DEVICE = cpu ] && echo 4000 || echo 465)}
OUT=${1:-benchmarks/results}

left() { echo $((LIMIT - SECONDS)); }
section() { # section NAME SECONDS COMMAND...
  local name=$1 most=$2 start=$SECONDS status
  shift 2
  [ $DEVICE = cpu ] && most=$((most * 10))
  [ "$(left)" -lt "$most" ] && most=$(left)
  echo "== $name (at most $most s; $(left) s left)"
  [ "$most" -lt 5 ] && { FAILED+=("$name: no time left"); return; }
  timeout --kill-after=5 "$most" "$@"
  status=$?
  echo "== $name: $([ $status = 0 ] && echo done || echo "FAILED, status $status") after $((SECONDS - start)) s"
  [ $status = 0 ] || FAILED+=("$name: status $status$([ $status = 124 ] && echo ', out of time')")
}
has() { "$PYTHON" -c "import $1" 2> /dev/null; }

facts() {
  nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm --format=csv,noheader || [ $DEVICE = cpu ]
  nvcc --version | tail -1
  "$PYTHON" -c "import sys, torch, triton; print('python', sys.version.split()[0], 'torch', torch.__version__, 'triton', triton.__version__, 'CUDA', torch.version.cuda)"
}
# Straight to CMake: the package's own build asks for a newer setuptools than such machines may have.
build() {
  local tree=build/gpu value
  value() { "$PYTHON" -c "import pybind11, sys, torch; from pathlib import Path; print($1)"; }
  local architectures=native
  [ $DEVICE = cpu ] && architectures=80-real
  cmake -S . -B $tree -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Release -DPYVSEG_NVCC="${NVCC-$(command -v nvcc)}" \
    -DPYVSEG_CUDA_ARCHITECTURES=$architectures -DPython_EXECUTABLE="$(value sys.executable)" \
    -Dpybind11_DIR="$(value 'pybind11.get_cmake_dir()')" -DTORCH_ROOT="$(value 'Path(torch.__file__).parent')" \
    -DTORCH_VERSION="$(value torch.__version__)" && cmake --build $tree ${MAX_JOBS:+-j $MAX_JOBS} -- --quiet || return
  for library in _C _C_cuda; do
    [ -f $tree/$library.so ] && cp --remove-destination $tree/$library.so pyvseg/
  done
  [ -e pyvseg/kernels ] || ln -s ../kernels pyvseg/kernels
  "$PYTHON" -c "
from pyvseg import ops
for op, backend, there, reason in ops.report():
    if backend in ('cuda', 'triton'): print(f'  {op:16} {backend:7} {\"yes\" if there else \"-\":4} {reason}')"
}
tests() {
  local parallel=()
  has xdist && parallel=(-n 8)
  if [ $DEVICE = cuda ]; then
    "$PYTHON" -m pytest -q -m gpu --tb=short -p no:cacheprovider --continue-on-collection-errors ${parallel[@]+"${parallel[@]}"} tests/ops
  else
    "$PYTHON" -m pytest -q --tb=short -p no:cacheprovider tests/ops/test_implementations.py -k "agrees and float32"
  fi
}
sanitizer() {
  local run=("$PYTHON" -m pytest -q -m gpu --tb=short -p no:cacheprovider tests/ops/test_implementations.py -k "cuda and agrees and float32")
  [ $DEVICE = cpu ] && run=("$PYTHON" -m pytest -q -p no:cacheprovider tests/cuda/test_emulator.py)
  if command -v compute-sanitizer > /dev/null && [ $DEVICE = cuda ]; then
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all --error-exitcode 9 --print-limit 20 "${run[@]}"
  else
    echo "compute-sanitizer is not here: skipped"
  fi
}
measure() {
  local size=(--write-choice --rounds 30 --budget 0.6 --seconds $(($(left) - 25)))
  [ $DEVICE = cpu ] && size=(--quick --rounds 3 --budget 1 --seconds 30)
  "$PYTHON" -m benchmarks --device $DEVICE "${size[@]}" --out "$OUT"
}
export -f facts build tests sanitizer measure left has
export PYTHON DEVICE OUT LIMIT

section "machine" 30 bash -c facts
section "build" 200 bash -c build
section "tests" 150 bash -c tests
section "compute-sanitizer" 45 bash -c sanitizer
section "benchmarks" 400 bash -c "SECONDS=$SECONDS; measure"

echo "== $SECONDS s in all; results in $OUT"
for each in ${FAILED[@]+"${FAILED[@]}"}; do echo "== FAILED $each"; done
[ ${#FAILED[@]} = 0 ]
