#!/bin/sh
# Runs tests/gpu in N processes on one GPU, then by themselves the tests that time something:
# scripts/gpu_tests.sh [N] [pytest arguments]. Kernels that one process has compiled are there for the others. Fails where
# a process fails, or takes longer than GPU_TESTS_SECONDS (300).
set -u
cd "$(dirname "$0")/.."
parts=${1:-8}
[ $# -gt 0 ] && shift
logs=$(mktemp -d)
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false COLUMNS=200
run() { # log, pytest arguments
  log=$1
  shift
  timeout -s INT -k 20 "${GPU_TESTS_SECONDS:-300}" "${PYTHON:-python3}" -m pytest -q -rf --tb=short --durations=5 -p no:cacheprovider "$@" >"$log" 2>&1
}
status=0
check() { # name, exit code: 5 is that no test was asked for
  if [ "$2" -ne 0 ] && [ "$2" -ne 5 ]; then
    status=1
    echo "== $1: exit $2"
    tail -n 60 "$logs/$1"
  fi
}
pids=""
part=1
while [ "$part" -le "$parts" ]; do
  run "$logs/$part" --part "$part/$parts" --ignore tests/gpu/test_bench.py "$@" tests/gpu &
  pids="$pids $!"
  part=$((part + 1))
done
part=1
for pid in $pids; do
  wait "$pid"
  check "$part" $?
  part=$((part + 1))
done
run "$logs/alone" "$@" tests/gpu/test_bench.py
check alone $?
tail -qn 1 "$logs"/*
grep -h "s call " "$logs"/* | sort -rn | head -n 8
rm -r "$logs"
exit $status
