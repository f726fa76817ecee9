#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash benchmarks/gpu.sh [OUT]: builds, tests and measures everything on a machine with a CUDA GPU, within 8 minutes.
# It needs torch >= 2.11 with CUDA, what pyvseg itself needs, Triton, pytest, hypothesis, cmake, ninja, pybind11 and a C++ compiler,
# and nvcc for more than Triton; no network, no installation. OUT (benchmarks/results by default) receives, as they come, <gpu>.json, <gpu>.md,
# measured.json (the fastest backends, also put in its place in pyvseg/ops), end_to_end.json and gpu.log; commit all but the log.
# A section that fails or runs out of time does not stop the next ones; the exit status is 1 if any did. --dry-run goes
# through all sections on a machine without a GPU: CPU build, emulated tests, quick sizes.
set -uo pipefail
cd "$(dirname "$0")/.."
WISH=${PYTHON:-python3}
PYTHON=$(command -v "$WISH") || { echo "gpu.sh: no $WISH here; set PYTHON" >&2; exit 2; }
export PYTHON PATH="$(dirname "$PYTHON"):/usr/local/cuda/bin:$PATH" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
FAILED=() DEVICE=cuda
[ "${1:-}" = --dry-run ] && { DEVICE=cpu; shift; }
LIMIT=${LIMIT:-$([ $DEVICE = cpu ] && echo 4000 || echo 465)}
OUT=${1:-benchmarks/results}

has() { "$PYTHON" -c "import $1" 2> /dev/null; }
for module in torch triton pytest hypothesis numpy pybind11 av cv2 pycocotools safetensors scipy tqdm tyro; do
  has $module || { echo "gpu.sh: $PYTHON has no $module; install it, or unpack its wheel into a folder of PYTHONPATH" >&2; exit 2; }
done
for tool in cmake ninja; do
  command -v $tool > /dev/null || { echo "gpu.sh: $tool is not on the PATH" >&2; exit 2; }
done
if [ $DEVICE = cuda ] && ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu.sh: torch sees no GPU; --dry-run goes through all sections without one" >&2
  exit 2
fi
mkdir -p "$OUT" || exit 2
exec > >(tee "$OUT/gpu.log") 2>&1

left() { echo $((LIMIT - SECONDS)); }
section() { # section NAME SECONDS COMMAND...
  local name=$1 most=$2 start=$SECONDS status
  shift 2
  [ $DEVICE = cpu ] && most=$((most * 10))
  [ "$(left)" -lt "$most" ] && most=$(left)
  echo "== $name (at most $most s; $(left) s left)"
  [ "$most" -lt 5 ] && { FAILED+=("$name: no time left"); return; }
  timeout --signal=INT --kill-after=5 "$most" "$@" # on an interrupt pytest still tells what failed until then
  status=$?
  echo "== $name: $([ $status = 0 ] && echo done || echo "FAILED, status $status") after $((SECONDS - start)) s"
  [ $status = 0 ] || FAILED+=("$name: status $status$([ $status = 124 ] && echo ', out of time')")
}

facts() {
  nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm --format=csv,noheader || [ $DEVICE = cpu ] || return
  command -v nvcc > /dev/null && nvcc --version | tail -1 || echo "no nvcc: only the Triton kernels are tested and measured"
  "$PYTHON" -c "import sys, torch, triton; print('python', sys.version.split()[0], 'torch', torch.__version__, 'triton', triton.__version__, 'CUDA', torch.version.cuda)"
}
# Straight to CMake: the package's own build asks for a newer setuptools than such machines may have.
build() {
  local tree=build/gpu value architectures=native suffix
  value() { "$PYTHON" -c "import pybind11, sys, sysconfig, torch; from pathlib import Path; print($1)"; }
  [ $DEVICE = cpu ] && architectures=80-real
  cmake -S . -B $tree -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Release -DPYVSEG_NVCC="${NVCC-$(command -v nvcc)}" \
    -DPYVSEG_CUDA_ARCHITECTURES=$architectures -DPython_EXECUTABLE="$(value sys.executable)" \
    -Dpybind11_DIR="$(value 'pybind11.get_cmake_dir()')" -DTORCH_ROOT="$(value 'Path(torch.__file__).parent')" \
    -DTORCH_VERSION="$(value torch.__version__)" && cmake --build $tree ${MAX_JOBS:+-j $MAX_JOBS} -- --quiet || return
  suffix=$(value 'sysconfig.get_config_var("EXT_SUFFIX")') # as an installation names them, in whose place they come
  for library in _C _C_cuda; do
    rm -f pyvseg/$library$suffix
    [ -f $tree/$library.so ] && cp $tree/$library.so pyvseg/$library$suffix
  done
  [ -e pyvseg/kernels ] || ln -sfn ../kernels pyvseg/kernels
  "$PYTHON" -c "
from pyvseg import ops
for op, backend, there, reason in ops.report():
    if backend in ('cuda', 'triton'): print(f'  {op:16} {backend:7} {\"yes\" if there else \"-\":4} {reason}')"
}
tests() {
  local parallel=()
  has xdist && parallel=(-n 8)
  if [ $DEVICE = cuda ]; then
    "$PYTHON" -m pytest -q -m gpu --tb=short -p no:cacheprovider --continue-on-collection-errors ${parallel[@]+"${parallel[@]}"} \
      tests/ops tests/layers/test_graphs.py tests/layers/test_conv.py tests/models/test_stcn_gpu.py tests/engine/test_gpu.py
  else
    "$PYTHON" -m pytest -q --tb=short -p no:cacheprovider tests/ops/test_implementations.py -k "agrees and float32"
  fi
}
measure() {
  local size=(--write-choice --rounds 30 --budget 0.6 --seconds $(($(left) - 190)))
  [ $DEVICE = cpu ] && size=(--quick --rounds 3 --budget 1 --seconds 30)
  "$PYTHON" -m benchmarks --device $DEVICE "${size[@]}" --out "$OUT"
  local status=$?
  [ $DEVICE = cuda ] && cp pyvseg/ops/measured.json "$OUT"
  return $status
}
# From files to files: PCVOS at 480p and CTVIS at 360p, random weights. Aims on an H100: 300 and 150 frames per second.
end_to_end() {
  local options=(--seconds 60)
  [ $DEVICE = cpu ] && options=(--quick --seconds 30)
  "$PYTHON" -m benchmarks.end_to_end --device $DEVICE "${options[@]}" --out "$OUT/end_to_end.json"
}
sanitizer() {
  if command -v compute-sanitizer > /dev/null && [ $DEVICE = cuda ]; then
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all --error-exitcode 9 --print-limit 20 \
      "$PYTHON" -m pytest -v -m gpu --tb=short -p no:cacheprovider tests/ops/test_implementations.py -k "agrees and float32 and not triton"
  else
    echo "compute-sanitizer is not here: skipped"
  fi
}
export -f facts build tests measure end_to_end sanitizer left has
export DEVICE OUT LIMIT

section "machine" 30 bash -c facts
section "build" 150 bash -c build
section "tests" 130 bash -c tests
section "benchmarks" 400 bash -c "SECONDS=$SECONDS; measure"
section "end to end" 90 bash -c end_to_end
section "compute-sanitizer" 90 bash -c sanitizer

echo "== $SECONDS s in all; results in $OUT"
for each in ${FAILED[@]+"${FAILED[@]}"}; do echo "== FAILED $each"; done
[ ${#FAILED[@]} = 0 ]
