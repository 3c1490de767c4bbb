"""The blend room: how the stored KV of several chunks become one coherent KV.

A policy is one file here, a frozen dataclass that subclasses `Policy`, and one line in `POLICIES`.
"""

from __future__ import annotations

from chunkcache.blend.cache import FusedCache, layer_kv
from chunkcache.blend.cacheblend import CacheBlend
from chunkcache.blend.cachecraft import CacheCraft
from chunkcache.blend.decoder import Decoder
from chunkcache.blend.full import Full
from chunkcache.blend.fusionrag import FusionRAG
from chunkcache.blend.kvshift import KVShift
from chunkcache.blend.link import Link
from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy
from chunkcache.blend.policy import parse_policy as _parse_policy
from chunkcache.blend.prefill import SelectivePrefill
from chunkcache.blend.prefix import Exact, Prefix
from chunkcache.blend.prophetkv import ProphetKV
from chunkcache.blend.query import Query
from chunkcache.blend.reuse import Reuse
from chunkcache.blend.selfcheck import SelfCheck, self_check

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Full,
        Prefix,
        Exact,
        Reuse,
        Link,
        CacheBlend,
        CacheCraft,
        FusionRAG,
        ProphetKV,
        KVShift,
        Query,
    )
}


def parse_policy(text: str | Policy) -> Policy:
    """Return the policy that a string such as `link:k=8` names; a `Policy` is returned as it is.

    Raises:
        PolicyError: the name or an option is unknown, or a value is malformed or out of range.
    """
    return _parse_policy(text, POLICIES)


__all__ = [
    "POLICIES",
    "Decoder",
    "FusedCache",
    "Plan",
    "Policy",
    "SelectivePrefill",
    "SelfCheck",
    "layer_kv",
    "parse_policy",
    "self_check",
]
