#!/usr/bin/env bash
# The first half hour on an NVIDIA GPU, from a bare checkout: no pip, no network.
#
#   tools/gpu.sh                      all stages, in this order
#   tools/gpu.sh smoke tests          some of them: versions smoke tests triage headlines streams why repeat
#   tools/gpu.sh --dry-run            the same on a CPU, at toy sizes, without the packages that such a machine lacks
#
# Each stage has a time limit and writes to $OUT (default runs/gpu) as it goes, so that a run that is
# cut off leaves what it has. $OUT/stages.txt has a line per stage: name, exit code, seconds.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-runs/gpu}")
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$PWD/build/triton}"
BENCH=dsv3_ref.kernels.bench
DRY=
if [ "${1:-}" = --dry-run ]; then DRY=1; shift; fi
PYTHON=${PYTHON:-python}
if [ -n "$DRY" ]; then
  export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
  bare() { PYTHONPATH=$PWD/tests "$PYTHON" tools/bare.py "$@"; }
  # the tests' interpreter rounds as a GPU does
  SMOKE_MODULE=(-c "import interpreter, sys; from $BENCH.smoke import main; sys.exit(main())")
  SMOKE="--device cpu --divisor 128 --only quant permute topk rotary fp8_gemm paged"
  BENCH_FLAGS="--dry-run"
  END_TO_END="--device cpu --config tiny --layers 2 --steps 2 --rows 1"
  TEST_FLAGS="-n 0 -k map_of_tiles"
else
  export TRITON_INTERPRET=0
  bare() { PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" "$@"; }
  SMOKE_MODULE=(-m $BENCH.smoke)
  SMOKE="--device cuda"
  BENCH_FLAGS="--seconds 60 --rounds 25"
  END_TO_END="--device cuda --config small --steps 20"
  TEST_FLAGS="-n ${WORKERS:-14} --dist worksteal --timeout 120"
fi

versions() {
  bare -c 'import sys, torch, triton; print(sys.version, "torch", torch.__version__, "triton", triton.__version__)'
  bare -c 'import torch; print(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "no GPU")'
  nvidia-smi 2>/dev/null || true
}
smoke() { bare "${SMOKE_MODULE[@]}" $SMOKE --out "$OUT/smoke.json"; }
tests() { bare -m pytest -q -rf $TEST_FLAGS tests/kernels/test_kernels_*.py tests/kernels/test_interpreter.py; }
triage() { # the tests that failed again, one launch at a time; then memory errors and races
  CUDA_LAUNCH_BLOCKING=1 bare -m pytest -q -n 0 --last-failed --last-failed-no-failures none -k "${DRY:+map_of_tiles}" \
    tests/kernels/test_kernels_*.py
  local status=$?
  [ $status != 5 ] || status=0 # no test had failed
  command -v compute-sanitizer >/dev/null || return $status
  for tool in memcheck racecheck; do
    for case in "fp8_gemm m=" paged_attention "attention backward"; do
      bare_sanitized "$tool" "$case" || status=1
    done
  done
  return $status
}
bare_sanitized() {
  PYTHONPATH=$PWD compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$PYTHON" -m $BENCH.smoke --divisor 16 --only "$2" --out "$OUT/sanitizer.json"
}
HEADLINES=(--only "fp8_gemm m=4096 n=7168 k=16384" "fp8_grouped_gemm e=8" "attention s=4096" "attention backward s=4096" "paged_attention b=128 t=4096")
headlines() {
  bare -m $BENCH $BENCH_FLAGS "${HEADLINES[@]}" --out "$OUT/headlines.json"
  local status=$?
  DSV3_WARP_SPECIALIZATION=0 bare -m $BENCH $BENCH_FLAGS --only fp8_gemm fp8_grouped \
    --out "$OUT/headlines_without_warp_specialization.json" || status=1
  return $status
}
streams() {
  bare -m $BENCH $BENCH_FLAGS --out "$OUT/streams.json" --only \
    quant rms_norm swiglu rotary topk permute dispatch combine cross_entropy moe_step
}
why() { # a model from end to end, a trace of a step, and three kernels under the profiler
  bare -m $BENCH.end_to_end $END_TO_END --trace "$OUT/step.json" --out "$OUT/end_to_end.json"
  local status=$?
  if [ -z "$DRY" ] && command -v ncu >/dev/null; then
    for case in "fp8_gemm m=" "attention s=4096" act_quant; do
      PYTHONPATH=$PWD timeout 60 ncu --clock-control none --set full --launch-count 3 \
        --kernel-name 'regex:_(fp8_gemm|attention|act_quant)_kernel' \
        "$PYTHON" -m $BENCH.smoke --only "$case" --out "$OUT/ncu.json" > "$OUT/ncu_${case%% *}.txt" 2>&1
    done
  fi
  return $status
}
repeat() { bare -m $BENCH $BENCH_FLAGS "${HEADLINES[@]}" --out "$OUT/headlines_again.json"; }

if [ -n "${STAGE:-}" ]; then
  "$STAGE"
  exit
fi
status=0
for entry in versions:60 smoke:240 tests:360 triage:180 headlines:360 streams:300 why:180 repeat:120; do
  name=${entry%%:*} seconds=${entry##*:}
  if [ $# -gt 0 ] && [[ " $* " != *" $name "* ]]; then continue; fi
  echo "== $name (at most $seconds s)"
  start=$SECONDS
  STAGE=$name OUT=$OUT timeout --kill-after 10 "$seconds" tools/gpu.sh ${DRY:+--dry-run} 2>&1 |
    tee "$OUT/$name.log"
  code=${PIPESTATUS[0]}
  echo "$name $code $((SECONDS - start))" | tee -a "$OUT/stages.txt"
  [ "$code" = 0 ] || status=1
done
exit $status
