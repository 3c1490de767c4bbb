"""llama.cpp's server, through xllamacpp: `server_llamacpp.py GGUF PORT THREADS SLOTS REUSE`, until stdin ends.

It runs under the peer's own Python and imports nothing of chunkcache. Settings, and why:

- `n_parallel`, as many slots as our server runs sequences; one context for all of them, of 4,096 tokens each.
- Keys and values as float32, and float32 weights: what transformers computes with.
- REUSE is `n_cache_reuse`: 0, its default, reuses a common beginning only; above, runs of so many tokens are shifted.
"""

from __future__ import annotations

import os
import sys

import xllamacpp  # type: ignore[import-not-found]

SLOT_TOKENS = 4096


def main() -> None:
    """Serve until stdin ends."""
    path, port, threads, slots, reuse = sys.argv[1], *map(int, sys.argv[2:6])
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.port = port
    params.n_parallel = slots
    params.n_ctx = SLOT_TOKENS * slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.n_cache_reuse = reuse
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    os.read(0, 1)
    os._exit(0)  # its threads do not end by themselves


if __name__ == "__main__":
    main()
