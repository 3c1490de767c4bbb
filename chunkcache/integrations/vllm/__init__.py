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


def transfer_config(**options: Any) -> dict[str, Any]:
    """Return the keywords of vLLM's `KVTransferConfig` for this connector; as JSON, `--kv-transfer-config`.

    Args:
        options: the connector's; see `chunkcache.integrations.vllm.options`.
    """
    return {
        "kv_connector": "ChunkCacheConnector",
        "kv_connector_module_path": __name__,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": options,
    }


def __getattr__(name: str) -> Any:
    if name == "ChunkCacheConnector":
        from chunkcache.integrations.vllm.connector import ChunkCacheConnector

        return ChunkCacheConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["ChunkCacheConnector", "ChunkSpec", "request_params", "transfer_config"]
