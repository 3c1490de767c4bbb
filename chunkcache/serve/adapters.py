"""Adapters of peft as models of their own: which there are, and the routes by which they come and go.

The routes have vLLM's names. They are there only where the server is started with them, for admins alone, and a name
in a request is looked up among the folders that there are: it is never made a path.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from chunkcache.engine.adapters import Adapters
from chunkcache.errors import InputError
from chunkcache.serve import schema
from chunkcache.serve.errors import HTTPError
from chunkcache.serve.fields import FunctionName, NonEmpty, Strict

_UNLOAD_S = 60.0  # that answers with an adapter get to end


class ServedAdapters:
    """The adapters that clients may name as a model.

    Args:
        adapters: those of the model.
        base: what the model itself is called.
    """

    def __init__(self, adapters: Adapters, base: str) -> None:
        self._adapters, self._base = adapters, base
        self._changed = threading.Condition()
        self._names: list[str] = []
        self._used: Counter[str] = Counter()

    @property
    def names(self) -> list[str]:
        """Their names."""
        with self._changed:
            return list(self._names)

    def adapter_of(self, model: str) -> str | None:
        """Return the adapter that a model of this name is answered with; None for the model itself.

        Raises:
            HTTPError: there is no such model.
        """
        if model == self._base:
            return None
        names = self.names
        if model not in names:
            known = ", ".join(map(repr, [self._base, *names]))
            raise HTTPError(404, f"there is no model {model!r} here, but {known}", "model_not_found", "model")
        return model

    @contextmanager
    def used(self, model: str) -> Iterator[None]:
        """Keep the adapter of a model in the block.

        Raises:
            HTTPError: there is no such model.
        """
        with self._changed:
            name = self.adapter_of(model)
            if name is not None:
                self._used[name] += 1
        try:
            yield
        finally:
            if name is not None:
                with self._changed:
                    self._used[name] -= 1
                    self._changed.notify_all()

    def load(self, name: str, folder: Path) -> None:
        """Serve the adapter in a folder.

        Raises:
            InputError, UnsupportedModelError: it cannot be served, or there is a model of that name.
        """
        if name == self._base:
            raise InputError(f"{name!r} is the model itself; call the adapter otherwise")
        self._adapters.add(name, folder)
        with self._changed:
            self._names.append(name)

    def unload(self, name: str) -> None:
        """Serve an adapter no more: new requests do not find it, and it goes when those that have it are answered.

        Raises:
            HTTPError: there is none, or its answers do not end.
            InputError: it cannot be taken off the model, and is served on.
        """
        with self._changed:
            if name not in self._names:
                raise HTTPError(404, f"there is no adapter {name!r}", "model_not_found", "lora_name")
            self._names.remove(name)
            if not self._changed.wait_for(lambda: not self._used[name], _UNLOAD_S):
                self._names.append(name)
                raise HTTPError(503, f"answers with {name!r} are still under way; ask again", retry=True)
        try:
            self._adapters.remove(name)
        except BaseException:
            with self._changed:
                if name in self._adapters.names:
                    self._names.append(name)
            raise


class LoadAdapter(Strict):
    """POST /v1/load_lora_adapter. The path is the name of a folder in the server's folder of adapters."""

    lora_name: FunctionName
    lora_path: Annotated[NonEmpty, Field(max_length=255)] | None = None


class UnloadAdapter(Strict):
    """POST /v1/unload_lora_adapter."""

    lora_name: FunctionName


def _admin(request: Request) -> Any:
    """Return the server, if an admin asks."""
    server = request.app.state.server
    tenant = server.options.tenants.find(request.headers.get("authorization"))
    request.state.record.tenant = tenant.name
    if server.options.tenants and not tenant.admin:
        raise HTTPError(403, "this key is no admin's: adapters come and go by one with admin = true")
    return server


Admin = Annotated[Any, Depends(_admin)]
router = APIRouter(responses={**schema.errors(403, 404), **schema.POSTED})


@router.post("/v1/load_lora_adapter")
async def load(asked: LoadAdapter, server: Admin) -> dict[str, Any]:
    """Serve an adapter out of the folder of adapters."""
    folder = server.options.adapter_dir
    known = {} if folder is None else {each.name: each for each in folder.iterdir() if each.is_dir()}
    path = known.get(asked.lora_path or asked.lora_name)
    if path is None:
        raise HTTPError(404, "there is no adapter of that name in the server's --adapter-dir", param="lora_path")
    await run_in_threadpool(server.service.adapters.load, asked.lora_name, path)
    found: dict[str, Any] = server.service.about(asked.lora_name)
    return found


@router.post("/v1/unload_lora_adapter")
async def unload(asked: UnloadAdapter, server: Admin) -> dict[str, Any]:
    """Serve an adapter no more."""
    await run_in_threadpool(server.service.adapters.unload, asked.lora_name)
    return {"id": asked.lora_name, "object": "model", "deleted": True}
