"""The indexes that `chunkcache serve --index` begins with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from chunkcache.cli.console import progress
from chunkcache.engine.faults import log_fault
from chunkcache.errors import InputError
from chunkcache.retriever import Document, load_documents
from chunkcache.serve.background import Steps
from chunkcache.serve.service import Service
from chunkcache.serve.tenants import Tenant, Tenants

_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class GivenIndex:
    """An index, whose it is, and its documents."""

    tenant: Tenant
    name: str
    documents: Sequence[Document]


def read_indexes(specs: Iterable[str], tenants: Tenants) -> list[GivenIndex]:
    """Read the documents of indexes, each given as NAME=PATH, or as TENANT/NAME=PATH where there are tenants.

    Raises:
        InputError: one is not of this form, or there is no such tenant.
        DocumentError: there are no documents.
    """
    known = {tenant.name: tenant for tenant in tenants.all} or {"": Tenant()}
    given = []
    for spec in specs:
        label, _, path = spec.partition("=")
        owner, _, name = label.rpartition("/")
        if not path or not _NAME.fullmatch(name):
            raise InputError(f"--index {spec!r}: give NAME=PATH, the name of letters, digits, '.', '_' and '-'")
        if owner not in known:
            names = ", ".join(repr(each) for each in known)
            raise InputError(f"--index {spec!r}: the tenants are {names}, not {owner!r}; give TENANT/NAME=PATH")
        given.append(GivenIndex(known[owner], name, load_documents(path)))
    return given


def fill_indexes(service: Service, given: Sequence[GivenIndex]) -> None:
    """Make indexes; the KV of their chunks are computed in the background, one index after another."""
    jobs: list[Steps[dict[str, Any]]] = []
    with progress("indexing documents") as on_progress:
        total, done = sum(len(each.documents) for each in given), 0
        for each in given:
            documents = each.documents
            steps = service.indexes.put(each.tenant, (), each.name, partial(list, documents), None)
            next(steps)
            for _ in documents:
                next(steps)
                done += 1
                on_progress(done, total)
            jobs.append(steps)
    if jobs:  # one job, so that any number of indexes finds a place
        service.background.submit(given[0].tenant.name, _chained(jobs))


def _chained(jobs: Sequence[Steps[dict[str, Any]]]) -> Steps[None]:
    """Do one job after another; one that fails is told, and ends no other."""
    for job in jobs:
        try:
            yield from job
        except Exception as error:  # noqa: BLE001 - told in the log
            log_fault("the KV of an index could not be computed ahead", error)
