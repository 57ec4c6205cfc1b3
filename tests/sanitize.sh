#!/usr/bin/env bash
# The tests of the compiled operator under AddressSanitizer and UndefinedBehaviorSanitizer: reads and
# writes beyond arrays end the run. Python and PyTorch stay as they are, so that leaks of theirs are
# not looked for. Arguments are those of pytest; without any, all tests that call the operator run.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
[ $# -gt 0 ] || set -- tests/memory tests/cpu/test_fused.py tests/cpu/test_operators.py tests/cpu/test_rows.py tests/cpu/test_step.py tests/test_decoding.py tests/test_decoding_changes.py tests/export/test_native.py -k "not 16384"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 XDG_CACHE_HOME="$cache"
export CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
python=${PYTHON:-venv/bin/python}
# Built beforehand: the compiler needs minutes with the sanitizer inside itself.
"$python" -c 'import os, shlex
from hamt.cpu.library import FOLDER, _compile
for source in ("fused.cpp", "rows.cpp", "step.cpp"):
    _compile(FOLDER / source, shlex.split(os.environ["CXX"]), ["-fopenmp"])'
LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so)" \
    "$python" -m pytest -q -p no:cacheprovider "$@"
