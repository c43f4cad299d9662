#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build, test, benchmark or profile on a GPU machine, each in less than 10 minutes, without network:
#   benchmarks/gpu.sh build | test | bench | profile [RESULTS]
# Needs python3 with torch, triton, setuptools, pytest, pytest-xdist and hypothesis, a C++ compiler
# and nvcc. RESULTS is a folder ($OUT, or runs/gpu, by default). All is built in the source tree.
# Wheels in $WHEELS, of packages to compare with, are unpacked for `bench` without what they need.
set -euo pipefail
case "${1:-}" in
  build | test | bench | profile) ;;
  *)
    sed -n '3,7s/^# //p' "$0"
    exit 2
    ;;
esac
cd "$(dirname "$0")/.."
results=${2:-${OUT:-runs/gpu}}
mkdir -p "$results"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

build() {
  KDKERNELS_CUDA=1 python3 setup.py build_ext --inplace 2>&1 | tee "$results/build.log"
  python3 -m kdkernels info | tee "$results/info.txt"
}

if [ "$1" != build ] && [ ! -e kdkernels/_build.json ]; then build; fi

case "$1" in
  build) build ;;
  test)
    # Workers share Triton's cache, and compiling is most of the time. The trainer's tests, whose
    # dependencies may be missing here, are no reason to run none.
    # INT: what has failed by then is still told.
    timeout -s INT -k 15 560 python3 -m pytest -m gpu -n "${WORKERS:-8}" -q --durations=10 \
      --continue-on-collection-errors --junitxml="$results/tests.xml" tests 2>&1 | tee "$results/tests.log"
    ;;
  bench)
    if [ -n "${WHEELS:-}" ]; then
      python3 -m pip install -q --no-index --no-deps --target runs/peers "$WHEELS"/*.whl
      PYTHONPATH+=:$PWD/runs/peers
    fi
    timeout 580 python3 benchmarks/run.py --device cuda --seconds 0.5 --within 480 \
      --output "$results" 2>&1 | tee "$results/bench.log"
    ;;
  profile)
    metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
    metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,sm__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active
    metrics+=,launch__registers_per_thread
    # Few files, since few come back from some machines.
    kernels=$results/kernels.txt counters=$results/counters.csv
    : >"$kernels" && : >"$counters"
    for backend in ${BACKENDS:-cuda triton}; do
      for what in kl_div/8192x128256 kl_div/256x1000 kl_div/4096x32000 kl_div/2048x262144 \
        kd_loss/8192x128256; do
        [ $SECONDS -lt 420 ] || { echo "$what $backend: not run, for want of time" && continue; }
        name=${what//\//-}-bf16-$backend
        step=(python3 benchmarks/step.py "${what%/*}" "${what#*/}" bf16 "$backend")
        echo "# $name" | tee -a "$kernels" >>"$counters"
        timeout 60 "${step[@]}" >>"$kernels" 2>&1 || echo "$name: step failed"
        # Counters need a permission that many machines do not give.
        UNDER_NCU=1 timeout 90 ncu --profile-from-start off --clock-control none \
          --metrics "$metrics" --csv --log-file "$counters.part" "${step[@]}" >/dev/null 2>&1 ||
          echo "$name: no counters, see $counters"
        [ ! -e "$counters.part" ] || { cat "$counters.part" >>"$counters" && rm "$counters.part"; }
      done
    done
    grep -E "^# |gpu__time_duration|dram__" "$counters" || true
    ;;
esac
