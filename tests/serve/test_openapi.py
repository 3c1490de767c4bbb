"""The server does what its OpenAPI says, whatever is sent: schemathesis makes it up."""

from __future__ import annotations

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig
from support.llm import own_model, wrapped
from support.server import MODEL, served

from chunkcache.serve.tenants import Tenant, Tenants, digest

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "6"))
KEY = "key-of-the-first-tenant"
CONFIG = {
    "headers": {"Authorization": f"Bearer {KEY}"},
    "checks": {
        # What a schema cannot say, such as a prompt that is too long for the model, is a 400 as well.
        "positive_data_acceptance": {"expected-statuses": ["2xx", 400, 401, 404, 413, 429]},
        "negative_data_rejection": {"expected-statuses": [400, 401, 404, 405, 413]},
    },
}


@pytest.fixture(scope="module")
def api():
    with served(wrapped(own_model()), tenants=Tenants({digest(KEY): Tenant("one")})) as (url, _):
        config = SchemathesisConfig.from_dict(CONFIG)
        schema = schemathesis.openapi.from_url(
            f"{url}/openapi.json", config=config, headers={"Authorization": f"Bearer {KEY}"}
        )
        named = {"const": MODEL}
        for request in (
            "ChatRequest",
            "CompletionRequest",
            "ResponseRequest",
            "CohereRequest",
        ):  # else nearly all is told 404
            schema.raw_schema["components"]["schemas"][request]["properties"]["model"] = named
        yield schema


SETTINGS = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/chunks", "/v1/documents", "/v2/chat"]
GETS = ["/v1/models", "/v1/models/{name}", "/v1/documents", "/health", "/metrics"]


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        *(("POST", path, mode) for path in POSTS for mode in GenerationMode),
        *(("GET", path, GenerationMode.POSITIVE) for path in GETS),
        ("DELETE", "/v1/documents/{document}", GenerationMode.POSITIVE),
    ],
)
def test_whatever_is_sent_the_answer_is_one_that_is_told(api, method, path, mode):
    @SETTINGS
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(timeout=60)

    check()
