"""The router and two servers under Ray Serve, one of which is killed while both answer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest
from support.fleet import ASK, CHAT, LONG, Stream, for_each, until
from support.llm import saved_model

from chunkcache.errors import InputError
from chunkcache.serve.probe import free_port

pytest.importorskip("grpc", reason="Ray Serve's packages are not installed: .ci/ray.txt")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture
def ray_serve(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    import ray
    from ray import serve

    port = free_port()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield serve, f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def server_at(url):
    """Return the process that listens at `url`."""
    port = url.rpartition(":")[2].encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes().split(b"\0")
        if b"chunkcache.serve.child" in words and port in words:
            return int(path.parent.name)
    raise AssertionError(f"no server listens at {url}")


def up(url):
    return httpx.get(f"{url}/health", timeout=60).json().get("up")


def replicas(url):
    told = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return {
        line.split('"')[1] for line in told if line.startswith("chunkcache_router_replica_up{") and " 1.0" in line
    }


def running(url):
    told = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in told if line.startswith("chunkcache_router_running{"))


def test_one_of_two_servers_dies_and_another_takes_its_place(ray_serve, tmp_path):
    from chunkcache.serve.ray import build_app

    serve, url = ray_serve
    options = ["--name", "tiny", "--store", f"disk://{tmp_path / 'store'}"]
    application = {"model": saved_model(tmp_path / "model"), "options": options, "cpus": 0.5}
    serve.run(build_app(application), name="chunkcache")
    until(lambda: up(url) == 2)
    lost, kept = names = sorted(replicas(url))
    bodies = for_each(names, **LONG)
    with httpx.stream("POST", url + CHAT, json=bodies[kept], timeout=60) as left:
        lines = left.iter_lines()
        next(lines)
        assert running(url) == 1
    until(lambda: not running(url))  # Ray Serve tells of a client that goes away
    cut, whole = Stream(url, bodies[lost]), Stream(url, bodies[kept])
    until(lambda: cut.has_text and whole.has_text)
    os.kill(server_at(lost), signal.SIGKILL)
    cut.join(60)
    whole.join(60)
    assert '"replica_lost"' in cut.events[-2]
    assert cut.events[-1] == whole.events[-1] == "[DONE]"
    assert "error" not in "".join(whole.events)
    assert httpx.post(url + CHAT, json={**ASK, "documents": bodies[lost]["documents"]}, timeout=60).status_code == 200
    until(lambda: len(replicas(url) - {lost}) == 2, 120)  # Ray Serve has started another


def test_what_is_no_application_is_told():
    from chunkcache.serve.ray import build_app

    for wrong in ({}, {"model": "m", "nope": 1}, {"model": "m", "replicas": "two"}):
        with pytest.raises(InputError, match="is no application"):
            build_app(wrong)
