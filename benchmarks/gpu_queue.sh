#!/usr/bin/env bash
# Everything that wants a GPU:
#
#     benchmarks/gpu_queue.sh "PART ..." OUTDIR
#
# PART      what it does
# build     builds the native module in this checkout, without touching the Python's torch and triton; doctor
# quick     a few cells of every benchmark, each family of kernels held to float64 first: does anything run, and how fast
# warm      compiles the CUDA C++ kernels that the other parts use, on all cores
# test      the kernels' tests, on the GPU
# sanitize  the CUDA C++ kernels under compute-sanitizer's memcheck and racecheck, on small shapes
# verify    every option of every operation against float64, on the GPU: as fastattn chooses, and all on Triton
# forward backward masked decode norms rope
#           the benchmark grid of that name: OUTDIR/<part>.jsonl and .md
# tune      searches the tiles of the Triton attention kernels and prints rows for tuning.py
# hopper    tries the rows of the Hopper attention kernels against each other and prints the winner of each cell
# portable  the same for the rows of the backward for every GPU
# all       every part above but tune, hopper and portable
#
# Parts named together run one after the other and share LIMIT seconds (default 550; `all` wants hours). One that fails does
# not keep the others from running, unless it is `build`; one that hangs is ended when the time is over, and has told by then
# what it found. OUTDIR/queue.log has all that was printed. On a machine that is lent for minutes and comes back bare, begin
# every call with `build`, and see what `quick` says before anything that takes longer.
#
# Where no package index is reached, the folder WHEELS (default .whl) holds as wheels what is missing there of pytest,
# pytest-xdist, hypothesis, expecttest and pybind11, and what these need. With pytest-xdist (and pytest 9) a test that hangs
# the GPU for two minutes, or leaves it unusable, is ended and the others go on.
set -euo pipefail
parts=${1:?parts, as the head of this script lists them}
out=${2:?a folder for results and logs}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
limit=${LIMIT:-550}
scratch=${TMPDIR:-/tmp}/fastattn-gpu-queue
cores=$(nproc)
mkdir -p "$out" "$scratch/site"
export PYTHONUNBUFFERED=1 # what a killed process had printed is in the log
export PYTHONPATH="$PWD:$scratch/site${PYTHONPATH:+:$PYTHONPATH}"

left() { echo $((limit > SECONDS + 5 ? limit - SECONDS : 5)); }

# Interrupts after so many seconds, once: twice would cut off what pytest says of failures, for which it needs up to 20.
within() { timeout --foreground --signal=INT --kill-after=30 "$@"; }

build() {
  local missing=() package
  for package in pybind11 pytest pytest-xdist hypothesis expecttest; do
    "$python" -c "import ${package#pytest-}" 2> /dev/null || missing+=("$package")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    if [ -d "$wheels" ]; then missing=(--no-index --no-deps "$wheels"/*.whl); fi
    "$python" -m pip install -q --upgrade --target "$scratch/site" "${missing[@]}" || echo "gpu_queue: lacks ${missing[*]}"
  fi
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv || true
  FASTATTN_REQUIRE_NATIVE=1 within "$(left)" "$python" setup.py -q build_ext --inplace || return
  "$python" -m fastattn doctor || true
}

quick() {
  local part worst=0
  for part in forward backward decode norms rope; do
    within "$(left)" "$python" -m fastattn.benchmarks.gpu "$part" --quick --budget 0.3 --out "$scratch/quick" --until 90 ||
      worst=$?
  done
  return "$worst"
}

# Several processes: the compiler's work is most of it, and one that is lost with its test is replaced.
tests() {
  local processes=()
  if "$python" -c "import xdist" 2> /dev/null; then
    processes=(-n $((cores > 4 ? cores * 3 / 4 : 2)) --dist worksteal --max-worker-restart 50)
  fi
  within "$(left)" "$python" -m pytest -rfE --tb=short --maxfail=100 "${processes[@]}" -p no:cacheprovider \
    -p fastattn.benchmarks.gpu.pytest_plugin -o faulthandler_timeout=120 -o faulthandler_exit_on_timeout=true "$@"
}

sanitize() {
  if ! command -v compute-sanitizer > /dev/null; then
    echo "gpu_queue: no compute-sanitizer on this machine" >&2 && return 3
  fi
  local tool worst=0
  for tool in memcheck racecheck; do # torch's caching allocator would hide an access beyond a tensor in its own blocks
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 within "$(($(left) / 2))" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -p no:cacheprovider tests/test_gpu.py -k sanitizer || worst=$?
  done
  return "$worst"
}

# Each operation and dtype in a process of its own: one that loses the GPU takes no other along.
verify() {
  local op dtype backend order=()
  for backend in "" triton; do
    for op in $("$python" -c "from fastattn.cli.scenarios import OPS; print(*OPS)"); do
      for dtype in bf16 fp16 fp32; do order+=("--op $op --dtype $dtype${backend:+ --backend $backend}"); done
    done
  done
  # shellcheck disable=SC2016  # expanded by the inner shell
  printf '%s\n' "${order[@]}" | within "$(left)" xargs -P "$cores" -I{} bash -c '
    found=$('"$python"' -m fastattn verify --device cuda {} 2>&1); status=$?
    printf "verify {}: status $status\n%s\n" "$found" | flock '"$scratch"' cat
    exit $status'
}

measure() {
  within "$(left)" "$python" -m "fastattn.benchmarks.$1" "${@:2}" --out "$out" --until "$(($(left) - 40))"
}

run() {
  case $1 in
    build | quick | sanitize | verify) "$1" ;;
    test)
      tests tests/test_gpu.py tests/test_gpu_benchmarks.py tests/test_cuda.py tests/test_launch.py tests/test_*_cuda*.py \
        tests/test_*_sm90.py tests/test_attention_triton*.py tests/test_layer_norm.py tests/test_rms_norm.py \
        tests/test_rope.py -k "triton or cuda or sm90 or launch or gpu" ;;
    warm) within "$(left)" "$python" -m fastattn warmup --headdim 64 128 256 --hidden 1024 4096 8192 ;;
    forward | backward | masked | decode | norms | rope) measure gpu "$1" ;;
    hopper) measure gpu.hopper ;;
    portable) measure gpu.hopper --phase portable --kind dense band pairs ;;
    tune) measure gpu.tune ;;
    *) echo "gpu_queue: no part $1" >&2 && return 2 ;;
  esac
}

status=0
if [ "$parts" = all ]; then
  parts="build quick warm verify test sanitize forward backward masked decode norms rope"
  limit=${LIMIT:-14400}
fi
for each in $parts; do
  if ((SECONDS > limit - 15)); then
    echo "gpu_queue: no time left for $each" | tee -a "$out/queue.log" && status=124 && continue
  fi
  failed=0
  { echo "== $each, after $SECONDS s" && run "$each"; } 2>&1 | tee -a "$out/queue.log" || failed=$?
  if ((failed)); then
    echo "gpu_queue: $each ended with status $failed" | tee -a "$out/queue.log"
    status=$failed
    if [ "$each" = build ]; then break; fi
  fi
done
exit "$status"
