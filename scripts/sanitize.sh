#!/bin/sh
# Builds tests/native with sanitizers and runs them: address + undefined behaviour, then threads. Needs no Python.
# Arguments name other sets, as in: scripts/sanitize.sh thread
set -eu
cd "$(dirname "$0")/.."
for set in "${@:-address,undefined thread}"; do
  for sanitizers in $set; do
    build="build/sanitize-$(echo "$sanitizers" | tr , -)"
    cmake -S . -B "$build" -DHASTEN_PYTHON=OFF -DHASTEN_NATIVE_TESTS=ON -DHASTEN_SANITIZE="$sanitizers" >/dev/null
    cmake --build "$build" --parallel "${JOBS:-2}"
    for test in pool products decoder; do
      echo "== $test under $sanitizers"
      UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 ASAN_OPTIONS=detect_leaks=1 \
        "$build/test_$test"
    done
  done
done
