#!/bin/sh
# Runs tests/gpu in N processes on one GPU: scripts/gpu_tests.sh [N] [pytest arguments]. Kernels that one has compiled are
# there for the others. Fails where a process fails, or takes longer than GPU_TESTS_SECONDS (300).
set -u
cd "$(dirname "$0")/.."
parts=${1:-8}
[ $# -gt 0 ] && shift
logs=$(mktemp -d)
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
pids=""
part=1
while [ "$part" -le "$parts" ]; do
  timeout "${GPU_TESTS_SECONDS:-300}" "${PYTHON:-python3}" -m pytest -q -rf --durations=5 -p no:cacheprovider --part "$part/$parts" \
    "$@" tests/gpu >"$logs/$part" 2>&1 &
  pids="$pids $!"
  part=$((part + 1))
done
status=0
part=1
for pid in $pids; do
  wait "$pid"
  code=$?
  if [ "$code" -ne 0 ]; then
    status=1
    echo "== part $part: exit $code"
    tail -n 60 "$logs/$part"
  fi
  part=$((part + 1))
done
tail -qn 1 "$logs"/*
grep -h "s call " "$logs"/* | sort -rn | head -n 8
rm -r "$logs"
exit $status
