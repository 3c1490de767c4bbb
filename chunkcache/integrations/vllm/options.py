"""The connector's options: `kv_connector_extra_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from chunkcache.blend import parse_policy
from chunkcache.errors import InputError

TESTED = ("0.32",)  # vLLM versions; its connector interface changes from one to the next


@dataclass(frozen=True)
class Options:
    """What can be set.

    Attributes:
        store: URL of the store, as for `open_store`.
        policy: policy of requests that name none.
        tenant: part of every key; other tenants never see these chunk KV.
        trust: label of whoever the chunks come from; see `CachedLLM.register`.
        find: whether known chunks are found, by their token ids, in prompts that do not say where they stand.
        calibration: file that `chunkcache calibrate` wrote.
        share: whether a store that others can reach is shared with Hugging Face processes, if both agree.
        fresh_tokens: tokens that nothing is stored of, at most, for a request to be fused.
        step_tokens: prompt tokens that are fused in one step, at most, if there are several requests.
        warm_tokens: tokens of missing chunks that are computed in one step; the last chunk may go over it, and what
            the first chunk behind a new prefix has before it is computed with it.
        lookup_s: seconds after which a request is served without what has not been found.
        share_salted: whether requests with a `cache_salt` of their own are fused: their chunks are shared by all.
        untested_device: whether another device than a CPU is accepted, where this has never run.
        untested_vllm: whether a version of vLLM is accepted that this was not tested with.
    """

    store: str = "memory://?max_bytes=2GiB"
    policy: str = "query"
    tenant: str = ""
    trust: str | None = None
    find: bool = False
    calibration: str | None = None
    share: bool = True
    fresh_tokens: int = 2048
    step_tokens: int = 8192
    warm_tokens: int = 512
    lookup_s: float = 5.0
    share_salted: bool = False
    untested_device: bool = False
    untested_vllm: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """Return the options that `kv_connector_extra_config` gives.

        Raises:
            InputError: one is unknown or of another type.
            PolicyError: the policy is unknown.
        """
        known = {field.name: getattr(cls, field.name) for field in fields(cls)}
        for name, value in (given or {}).items():
            if name not in known:
                raise InputError(f"kv_connector_extra_config has {name!r}; known are {', '.join(known)}")
            wanted = str if known[name] is None else type(known[name])
            if not isinstance(value, (int, float) if wanted is float else wanted):
                raise InputError(f"kv_connector_extra_config: {name}={value!r} is no {wanted.__name__}")
        options = cls(**dict(given or {}))
        parse_policy(options.policy)
        return options


def check_engine(version: str, failure_policy: str, options: Options) -> None:
    """Refuse an engine that this cannot be right in.

    Raises:
        InputError: its version was not tested, or it would fail requests whose KV cannot be loaded.
    """
    if ".".join(version.split(".")[:2]) not in TESTED and not options.untested_vllm:
        raise InputError(
            f"chunkcache was tested with vLLM {', '.join(TESTED)}; this is {version}. Install a tested one, or pass "
            "untested_vllm: true in kv_connector_extra_config"
        )
    if failure_policy != "recompute":
        raise InputError(
            f'kv_load_failure_policy is {failure_policy!r}: pass "recompute" in --kv-transfer-config, so that a lost '
            "entry is computed anew and fails no request"
        )
