#!/usr/bin/env bash
# Builds with sanitizers and runs the suite on that build:  tests/sanitize.sh [sanitizers [pytest's arguments]]
# In an environment with the test extra; the build goes to a temporary folder and nothing is installed.
#   tests/sanitize.sh                                  addresses and undefined behaviour, the quick part
#   tests/sanitize.sh thread tests/test_threads.py     data races
set -euo pipefail
cd "$(dirname "$0")/.."

sanitizers=${1:-address,undefined}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- -m "not slow" --ignore=tests/test_codebase.py

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
pip install -q . --no-deps --target "$folder/package" -C build-dir="$folder/build" \
    -C cmake.build-type=RelWithDebInfo -C cmake.define.FASTGD_SANITIZE="$sanitizers" -C cmake.define.FASTGD_CUDA=OFF

# Python is built without them: the runtime must be there before it, and beside it the exceptions that it watches.
# Python's own leaks are none of ours.
case $sanitizers in
    *thread*) runtime=libtsan.so ;;
    *) runtime=libasan.so ;;
esac
preload=
for library in "$runtime" libstdc++.so; do
    preload+=" $("${CXX:-c++}" -print-file-name="$library")"
done
export PYTHONPATH="$folder/package" FASTGD_REQUIRE_COMPILED=1
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:die_after_fork=0
LD_PRELOAD=$preload python -m pytest -q "$@"
