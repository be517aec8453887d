#!/usr/bin/env bash
# Verification, GPU tests and benchmarks on a CUDA machine, from a source tree; needs python3 with torch, triton, numpy and pytest, no network.
#
#   bash benchmarks/gpu.sh [verify] [tests] [roofline] [pass] [vectors] [weights] [small] [tiny] [crossover] [recurrent] [closing] [conv] [layers] [resnet50] [vgg16]
#
# Default: all of them, one by one. With a quarter of an hour and calls of ten minutes: verify pass vectors weights, then tests small crossover, then what is left.
#
# Results go to $OUT if it is set, else to benchmarks/results/<gpu>/. A stage that fails does not stop the next one; the exit code tells.
# A stage is stopped at its limit, none of which is above ten minutes: verify and tests compile every kernel, closing, layers, resnet50 and
# vgg16 every competitor, so each of these six deserves a call of its own where calls are short. Set NO_COMPILE=1 to leave the compiled competitors out.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$( [ -x .venv/bin/python ] && .venv/bin/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null && echo .venv/bin/python || echo python3 )}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
name=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-"))' 2>/dev/null) || {
  echo "error: $PYTHON sees no CUDA device; expected a machine with one" >&2; exit 2; }
out=${OUT:-benchmarks/results/$name}
mkdir -p "$out"
stages=${*:-verify tests roofline pass vectors weights small tiny crossover recurrent closing conv layers resnet50 vgg16}
status=0

run() {  # name, seconds, command...
  local stage=$1 limit=$2; shift 2
  echo "== $stage: $*"
  local start=$SECONDS
  timeout "$limit" "$@" 2>&1 | tee -a "$out/gpu.log"
  local code=${PIPESTATUS[0]}
  echo "== $stage: exit $code after $((SECONDS - start)) s"
  [ "$code" -eq 0 ] || status=1
}

for stage in $stages; do
  case $stage in
    verify)   run verify 420 "$PYTHON" -m dampr.bench.verify --json "$out/verify.json" ;;
    tests)    run tests 420 "$PYTHON" -m pytest -q -p no:cacheprovider -o filterwarnings=default -m gpu tests/gpu ;;
    roofline) run roofline 60 "$PYTHON" -m benchmarks.roofline --json "$out/roofline.json" ;;
    closing | layers | resnet50 | vgg16)  # compiling the competitors takes most of it: one stage of these per call where calls are short
      run "$stage" 560 "$PYTHON" -m benchmarks.run "$stage" --out "$out" --rounds 10 ${NO_COMPILE:+--no-compile} ;;
    pass | vectors | weights | small | tiny | crossover | recurrent | conv)
      run "$stage" 240 "$PYTHON" -m benchmarks.run "$stage" --out "$out" ${NO_COMPILE:+--no-compile} ;;
    *) echo "error: stage '$stage': expected verify, tests, roofline, pass, vectors, weights, small, tiny, crossover, recurrent, closing, conv, layers, resnet50 or vgg16" >&2; status=2 ;;
  esac
done
exit $status
