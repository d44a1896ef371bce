#!/usr/bin/env bash
# Every check that a change must pass, in an environment that has hasten[dev]. CI runs this file.
set -euo pipefail
cd "$(dirname "$0")/.."

ruff check .
ruff format --check .
mypy
# A clear word instead of pytest's exit code 5, should nothing have been collected.
status=0
python -m pytest "$@" || status=$?
if [ "$status" -eq 5 ]; then echo "pytest found no test to run" >&2; fi
exit "$status"
