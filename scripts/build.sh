#!/bin/sh
# Builds the compiled core and puts it into src/hasten, so that the source tree can be run and tested in place.
# PYTHON picks the interpreter; its environment must hold nanobind, and cmake must be there or on PATH.
set -eu
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
PATH="$(dirname "$python"):$PATH"
mkdir -p build
exec 9>build/.lock
flock 9  # two builds at once would write the same objects
generator=
if command -v ninja >/dev/null; then generator="-G Ninja"; fi
# shellcheck disable=SC2086
cmake -S . -B build $generator -DPython_EXECUTABLE="$python" >build/configure.log || { cat build/configure.log; exit 1; }
nice cmake --build build --target _core
module=$(ls -t build/_core*.so | head -n 1)
cp "$module" "src/hasten/.$(basename "$module").new"
mv "src/hasten/.$(basename "$module").new" "src/hasten/$(basename "$module")"  # in one step: a running process keeps the old file
