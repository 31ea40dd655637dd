#!/usr/bin/env bash
# Everything that wants a GPU, in parts that each end within ten minutes:
#
#     benchmarks/gpu_queue.sh PART OUTDIR
#
# PART      what it does
# build     installs this checkout into the current Python without touching its torch and triton; doctor
# warm      compiles the CUDA C++ kernels that the other parts use, on all cores
# test      the kernels' tests, on the GPU
# sanitize  the CUDA C++ kernels under compute-sanitizer's memcheck and racecheck, on small shapes
# verify    every option of every operation against float64, on the GPU: as fastattn chooses, and all on Triton
# forward backward masked decode norms rope
#           the benchmark grid of that name: OUTDIR/<part>.jsonl and .md
# tune      searches the tiles of the Triton attention kernels and prints rows for tuning.py
# hopper    tries the rows of the Hopper attention kernels against each other and prints the winner of each cell
# portable  the same for the rows of the backward for every GPU
# all       every part above but tune, hopper and portable, one after the other
#
# Each part writes OUTDIR/<part>.log and exits with its own status. `build` must have run once on the machine; where it
# reaches no package index, the folder WHEELS (default .whl) holds what is missing there: pytest, pytest-xdist, hypothesis,
# expecttest, pybind11 and what they need. A test that hangs the GPU is ended after two minutes and the others go on, if
# pytest is 9 or newer and pytest-xdist there.
set -euo pipefail
part=${1:?a part, as the head of this script lists them}
out=${2:?a folder for results and logs}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
mkdir -p "$out"

build() {
  for package in pybind11 pytest pytest-xdist hypothesis expecttest; do
    module=${package#pytest-}
    "$python" -c "import $module" 2>/dev/null && continue
    if [ -d "$wheels" ]; then index=(--no-index --find-links "$wheels"); else index=(); fi
    "$python" -m pip install -q "${index[@]}" "$package" || echo "gpu_queue: no $package"
  done
  FASTATTN_REQUIRE_NATIVE=1 "$python" -m pip install -q --no-build-isolation --no-deps -e .
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv || true
  "$python" -m fastattn doctor
}

# The tests in four processes: those share the compiler's work, and one that ends because its test hung is replaced.
tests() {
  local processes=()
  "$python" -c "import xdist" 2>/dev/null && processes=(-n 4 --dist worksteal)
  timeout 580 "$python" -m pytest -q --maxfail=25 "${processes[@]}" \
    -o faulthandler_timeout=120 -o faulthandler_exit_on_timeout=true "$@"
}

sanitize() {
  if ! command -v compute-sanitizer > /dev/null; then
    echo "gpu_queue: no compute-sanitizer on this machine" >&2 && return 3
  fi
  local tool worst=0
  for tool in memcheck racecheck; do # torch's caching allocator would hide an access beyond a tensor in its own blocks
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 290 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py -k sanitizer || worst=$?
  done
  return "$worst"
}

verify() {
  local force worst=0
  for force in "" "--backend triton"; do
    # shellcheck disable=SC2086  # no option, or two words
    timeout 290 "$python" -m fastattn verify --device cuda $force || worst=$?
  done
  return "$worst"
}

run() {
  case $1 in
    build) build ;;
    test)
      tests tests/test_gpu.py tests/test_cuda.py tests/test_launch.py tests/test_*_cuda*.py \
        tests/test_*_sm90.py tests/test_attention_triton*.py tests/test_layer_norm.py tests/test_rms_norm.py \
        tests/test_rope.py -k "triton or cuda or sm90 or launch or gpu" ;;
    warm) timeout 580 "$python" -m fastattn warmup --headdim 64 128 256 --hidden 1024 4096 8192 ;;
    sanitize) sanitize ;;
    verify) verify ;;
    forward | backward | masked | decode | norms | rope)
      timeout 590 "$python" -m fastattn.benchmarks.gpu "$1" --out "$out" --until 540 ;;
    hopper) timeout 590 "$python" -m fastattn.benchmarks.gpu.hopper --out "$out" --until 500 ;;
    portable)
      timeout 590 "$python" -m fastattn.benchmarks.gpu.hopper --phase portable --kind dense band pairs --out "$out" --until 500 ;;
    tune) timeout 590 "$python" -m fastattn.benchmarks.gpu.tune --out "$out" --until 500 ;;
    *) echo "gpu_queue: no part $1" >&2 && return 2 ;;
  esac
}

status=0
if [ "$part" = all ]; then parts=(build warm test sanitize verify forward backward masked decode norms rope); else parts=("$part"); fi
for each in "${parts[@]}"; do
  echo "== $each"
  run "$each" 2>&1 | tee "$out/$each.log" || status=$?
done
exit "$status"
