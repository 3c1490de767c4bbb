"""chunkcache inside vLLM: a KV connector for an unpatched engine.

The engine is started with

    --kv-transfer-config '{"kv_connector": "ChunkCacheConnector",
                           "kv_connector_module_path": "chunkcache.integrations.vllm",
                           "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
                           "kv_connector_extra_config": {"store": "disk:///var/cache/kv", "policy": "query"}}'

and each request says where its chunks stand: `SamplingParams(extra_args=request_params(prompt))`. Nothing of vLLM is
imported before the connector is asked for.
"""

from __future__ import annotations

from typing import Any

from chunkcache.integrations.vllm.spec import ChunkSpec, request_params


def __getattr__(name: str) -> Any:
    if name == "ChunkCacheConnector":
        from chunkcache.integrations.vllm.connector import ChunkCacheConnector

        return ChunkCacheConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["ChunkCacheConnector", "ChunkSpec", "request_params"]
