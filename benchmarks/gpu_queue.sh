#!/usr/bin/env bash
# Everything that wants a GPU, in parts that each end within ten minutes:
#
#     benchmarks/gpu_queue.sh PART OUTDIR
#
# PART      what it does
# build     installs this checkout into the current Python without touching its torch and triton; doctor
# test      the kernels' tests, on the GPU
# verify    every option of every operation against float64, on the GPU
# forward backward masked decode norms rope
#           the benchmark grid of that name: OUTDIR/<part>.jsonl and .md
# tune      searches the tiles of the attention kernels and prints rows for tuning.py
# all       every part above but tune, one after the other
#
# Each part writes OUTDIR/<part>.log and exits with its own status. `build` must have run once on the machine; where it
# reaches no package index, the folder WHEELS (default .whl) holds what is missing there: pytest, hypothesis, pybind11.
set -euo pipefail
part=${1:?a part: build, test, verify, forward, backward, masked, decode, norms, rope, tune or all}
out=${2:?a folder for results and logs}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
mkdir -p "$out"

build() {
  for package in pybind11 pytest hypothesis expecttest; do
    "$python" -c "import $package" 2>/dev/null && continue
    if [ -d "$wheels" ]; then index=(--no-index --find-links "$wheels"); else index=(); fi
    "$python" -m pip install -q "${index[@]}" "$package" || echo "gpu_queue: no $package"
  done
  FASTATTN_REQUIRE_NATIVE=1 "$python" -m pip install -q --no-build-isolation --no-deps -e .
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv || true
  "$python" -m fastattn doctor
}

run() {
  case $1 in
    build) build ;;
    test)
      timeout 580 "$python" -m pytest -q --maxfail=25 tests/test_gpu.py tests/test_launch.py tests/test_attention_triton.py \
        tests/test_attention_triton_kvcache.py tests/test_layer_norm.py tests/test_rms_norm.py tests/test_rope.py \
        -k "triton or launch or gpu" ;;
    verify) timeout 580 "$python" -m fastattn verify --device cuda ;;
    forward | backward | masked | decode | norms | rope)
      timeout 590 "$python" -m fastattn.benchmarks.gpu "$1" --out "$out" --until 540 ;;
    tune) timeout 590 "$python" -m fastattn.benchmarks.gpu.tune --out "$out" --until 500 ;;
    *) echo "gpu_queue: no part $1" >&2 && return 2 ;;
  esac
}

status=0
if [ "$part" = all ]; then parts=(build test verify forward backward masked decode norms rope); else parts=("$part"); fi
for each in "${parts[@]}"; do
  echo "== $each"
  run "$each" 2>&1 | tee "$out/$each.log" || status=$?
done
exit "$status"
