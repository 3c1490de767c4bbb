"""Servers under requests that arrive at a rate: the search, with our own server for a peer, and the comparison."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.llm import TEXTS, saved_model
from support.server import served

pytest.importorskip("fastapi")

from chunkcache.errors import PeerError
from chunkcache.eval.data import Case
from chunkcache.eval.peers import environments
from chunkcache.eval.peers.registry import PeerSpec
from chunkcache.eval.peers.servers import SERVERS, ServerSpec, server_of
from chunkcache.eval.serving import Clients
from chunkcache.eval.serving_rates import Load, Rivals
from chunkcache.eval.serving_summary import OURS, best_peer, passed, summary


def row(server, step, p90, **changed):
    base = {"part": "rate", "server": server, "step": step, "rate": 0.25 * 1.5**step, "ttft_p50_s": 0.1}
    return {**base, "ttft_p90_s": p90, "requests": 10, "failed": 0, "without_text": 0, **changed}


def test_the_peer_that_gets_furthest_is_the_best():
    rows = [
        row("a", 0, 0.5),
        row("a", 1, 2.5),
        row("b", 0, 1.0),
        row("b", 1, 1.5),
        row("b", 2, 3.0),
        row("c", 2, 2.9),
    ]
    assert best_peer(rows) == rows[-1]
    assert best_peer([*rows, row("d", 5, 9.0, without_text=10)]) == rows[-1]
    assert best_peer([*rows, row("d", 5, None, failed=10), row(OURS, 6, 4.0)]) == rows[-1]
    assert best_peer([row("a", 0, 0.5)]) is None
    assert [passed(each) for each in rows[:2]] == [False, True]
    assert passed(row("a", 0, None))


def test_the_summary_has_the_ratio_and_who_was_skipped():
    rows = [row("a", 1, 4.0), {"part": "rival", "server": "b", "skipped": "no wheel"}, row(OURS, 1, 1.0)]
    found = summary(SimpleNamespace(rows=rows))
    assert found["ttft_p90_to_peer"] == 0.25
    assert found["best_peer"] == "a"
    assert found["skipped"] == {"b": "no wheel"}
    assert len(found["tables"][0]["rows"]) == 2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two peers: our own server, and one that does not come up."""
    command = ["-m", "chunkcache", "serve"]
    own = PeerSpec("own", "", "")
    monkeypatch.setattr(PeerSpec, "requirements", Path(__file__))
    monkeypatch.setitem(SERVERS, "own", ServerSpec(own, lambda given: [
        str(given.python), *command, str(given.weights), "--port", str(given.port), "--name", str(given.weights)
    ], "", named=True))  # fmt: skip
    monkeypatch.setitem(SERVERS, "broken", ServerSpec(own, lambda given: [str(given.python), "-c", "1/0"], ""))
    python = tmp_path / "own" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    stamp = {"made_from": environments._made_from(own), "versions": {"own": "1"}}
    (tmp_path / "own" / environments.STAMP).write_text(json.dumps(stamp))
    return tmp_path


def test_servers_are_searched_and_ours_is_asked_at_the_rate_of_the_best(folder):
    model = Path(saved_model(folder / "model"))
    cases = [Case(f"{text.split()[1]}?", tuple(TEXTS)) for text in TEXTS]
    load = Load(cases=cases, chunks=2, tokens=3, requests=10, first=10.0)
    rivals = Rivals(load, folder, lambda name, form: model, threads=1, slots=2, limit_s=0.0)
    with served() as (url, _), Clients(2) as clients:
        rows = list(rivals.rows(["broken", "own"], clients))
        ours = rivals.ours(url, rows, clients)
    assert "ZeroDivisionError" in rivals.skipped["broken"]
    assert [each["server"] for each in rows if each["part"] == "rate"] == ["own"]
    assert rows[-1]["failed"] == rows[-1]["without_text"] == 0
    assert ours["failed"] == 10  # it goes by another name here


def test_the_requests_of_a_rate_are_its_own_and_come_again():
    cases = [Case(f"{number}?", (f"text {number}", f"text {number + 1}")) for number in range(20)]
    load = Load(cases=cases, chunks=2, tokens=3, requests=15)
    assert load.step(1) == load.step(1) != load.step(2)
    assert len(load.texts) == 21


def test_an_unknown_server_is_told(command_line, tmp_path):
    with pytest.raises(PeerError, match="there is no server 'nope'"):
        server_of("nope")
    code, _, error = command_line("bench", "serve", "data.json", "--peers", "kvboost")
    assert code == 2
    assert "--peers-in" in error
