"""LMCache in the same engine, for prefixes: the example, which checks that neither takes what is the other's.

It runs in a process of its own: once LMCache is imported, vLLM for CPUs starts no more engine in this one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/vllm/beside_lmcache.py"


@pytest.mark.skipif(importlib.util.find_spec("lmcache") is None, reason="LMCache is not installed")
def test_prefixes_are_lmcaches_and_chunks_are_ours(folders):
    environment = {**os.environ, "LMCACHE_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE), folders("llama")]
    ran = subprocess.run(command, env=environment, timeout=400, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "right" in ran.stdout.splitlines()


def test_the_connector_is_known_by_its_name():
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from chunkcache.integrations.vllm import ChunkCacheConnector

    name = ChunkCacheConnector.__name__
    assert KVConnectorFactory.get_connector_class_by_name(name) is ChunkCacheConnector
