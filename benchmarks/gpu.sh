#!/usr/bin/env bash
# Verification, GPU tests and benchmarks on a CUDA machine, from a source tree.
# Needs python3 with torch, triton, numpy and pytest, and no network.
#
#   bash benchmarks/gpu.sh [verify] [tests] [warm] [roofline] [kernels] [vectors] [weights] [pass] [small] [tiny]
#                          [crossover] [closing] [conv] [vgg16] [resnet50] [recurrent] [layers]
#
# Default: all of them, the most worth knowing first.
# verify, tests and warm (which compiles what the timed stages will time) wait for compilers and run side by side;
# what is timed runs alone.
# SECONDS_LEFT=500 begins no stage later than that and stops one that would last longer.
# BESIDE_SECONDS=200 stops what runs side by side after that long.
# NO_COMPILE=1 leaves the compiled competitors out.
#
# Results go to $OUT if it is set, else to benchmarks/results/<gpu>/.
# A stage that fails does not stop the next one; the exit code tells.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then  # that of .venv, if it sees the GPU
  PYTHON=python3
  sees_gpu='import torch, sys; sys.exit(not torch.cuda.is_available())'
  [ -x .venv/bin/python ] && .venv/bin/python -c "$sees_gpu" 2>/dev/null && PYTHON=.venv/bin/python
fi
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
named='import torch; print(torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-"))'
name=$("$PYTHON" -c "$named" 2>/dev/null) || {
  echo "error: $PYTHON sees no CUDA device; expected a machine with one" >&2; exit 2; }
out=${OUT:-benchmarks/results/$name}
mkdir -p "$out"
timed="roofline kernels vectors weights pass small tiny crossover closing conv vgg16 resnet50 recurrent layers"
stages=${*:-verify tests warm $timed}
limit=${SECONDS_LEFT:-36000}
cores=$(nproc)
status=0

run() {  # name, seconds, command...
  local stage=$1 most=$2; shift 2
  local start=$SECONDS left=$((limit - SECONDS))
  [ "$left" -gt 5 ] || { echo "== $stage: left out, no time"; return 1; }
  echo "== $stage: $*"
  timeout "$((most < left ? most : left))" "$@" > "$out/$stage.log" 2>&1
  local code=$?
  tail -n 60 "$out/$stage.log"
  echo "== $stage: exit $code after $((SECONDS - start)) s"
  return $code
}

bench() {  # stage, seconds, arguments...
  local stage=$1 most=$2; shift 2
  run "$stage" "$most" "$PYTHON" -m benchmarks.run "$stage" --out "$out" ${NO_COMPILE:+--no-compile} "$@"
}

beside=()
most=${BESIDE_SECONDS:-560}
# many processes: threads that wait for each other would take many times as long
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2
for stage in $stages; do
  case $stage in
    verify)
      run verify "$most" "$PYTHON" -m dampr.testing.verify --backend triton --processes $((cores / 2 + 2)) \
        --json "$out/verify.json" & beside+=($!) ;;
    tests)
      many=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n $((cores / 4 + 1))")
      run tests "$most" "$PYTHON" -m pytest -q -p no:cacheprovider -o filterwarnings=default -m gpu $many \
        tests/gpu & beside+=($!) ;;
    warm)  # each competitor is compiled once, into caches that the timed run finds
      for each in $stages; do
        case $each in
          verify | tests | warm | roofline | recurrent | layers) ;;
          kernels) run warm-kernels "$most" "$PYTHON" -m benchmarks.kernels --rounds 1 & beside+=($!) ;;
          *)
            run "warm-$each" "$most" "$PYTHON" -m benchmarks.run "$each" --unverified --rounds 1 --out "$out/warm" \
              ${NO_COMPILE:+--no-compile} & beside+=($!) ;;
        esac
      done ;;
  esac
done
for job in ${beside[@]+"${beside[@]}"}; do wait "$job" || status=1; done
unset OMP_NUM_THREADS TORCHINDUCTOR_COMPILE_THREADS
rm -rf "$out/warm"

verified=()
[ -f "$out/verify.json" ] && verified=(--verified "$out/verify.json")
for stage in $stages; do
  case $stage in
    verify | tests | warm) ;;
    roofline) run roofline 60 "$PYTHON" -m benchmarks.roofline --json "$out/roofline.json" ;;
    kernels) run kernels 120 "$PYTHON" -m benchmarks.kernels --json "$out/kernels.json" ;;
    closing | layers | resnet50 | vgg16) bench "$stage" 560 --rounds 10 ${verified[@]+"${verified[@]}"} ;;
    pass | vectors | weights | small | tiny | crossover | recurrent | conv)
      bench "$stage" 240 ${verified[@]+"${verified[@]}"} ;;
    *) echo "error: stage '$stage': expected verify, tests, warm or one of: $timed" >&2; (exit 2) ;;
  esac || status=1
done
exit $status
