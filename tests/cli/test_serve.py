"""`chunkcache serve` as a process of its own: curl asks it, and SIGTERM lets answers end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
from support.llm import saved_model

from chunkcache.serve.probe import free_port, is_up


@pytest.fixture
def model(tmp_path):
    return saved_model(tmp_path)


@pytest.fixture
def run(command_line):
    return command_line


@pytest.mark.parametrize("drain", ["30", "0"])
def test_a_process_is_asked_and_stopped(model, drain):
    port = free_port()
    command = [sys.executable, "-m", "chunkcache", "serve", model, "--port", str(port), "--name", "tiny"]
    command += ["--drain", drain, "--log-format", "json", "--running", "1", "--waiting", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CHUNKCACHE_API_KEY": "a-key-for-this-test"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 120
        while not is_up(url):
            assert server.poll() is None, server.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.1)
        with ExitStack() as connections:
            for _ in range(16):
                connections.enter_context(socket.create_connection(("127.0.0.1", port)))
            assert not is_up(url)  # 503
        while not is_up(url):
            time.sleep(0.1)
        asked = {
            "model": "tiny",
            "prompt": "The bridge",
            "max_tokens": 300,
            "logit_bias": {"2": -100},
            "stream": True,
        }
        curl = ["curl", "-sN", f"{url}/v1/completions", "-H", "Authorization: Bearer a-key-for-this-test"]
        curl += ["-H", "Content-Type: application/json", "-d", json.dumps(asked)]
        with subprocess.Popen(curl, stdout=subprocess.PIPE, text=True) as asking:
            events = [asking.stdout.readline()]
            server.send_signal(signal.SIGTERM)
            events += asking.stdout.read().splitlines(keepends=True)
        if drain == "0":
            assert len(events) < 2 * 300
            assert json.loads(events[-4].removeprefix("data: "))["error"]["code"] == "server_is_shutting_down"
            assert events[-2:] == ["data: [DONE]\n", "\n"]
        else:
            assert events[-2:] == ["data: [DONE]\n", "\n"]
            assert len(events) > 2 * 100  # the answer went on to its end
        _, told = server.communicate(timeout=60)
    assert server.returncode == 0
    assert f"at {url}/v1" in " ".join(told.split())
    assert "Traceback" not in told
    lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    [line] = [line for line in lines if line["event"] == "request" and line["route"] == "/v1/completions"]
    assert (line["status"], line["completion_tokens"] < 300) == (200, drain == "0")


def test_sigterm_ends_a_server_that_loads_its_model(run, monkeypatch):
    def load(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        raise AssertionError("it loads on")

    monkeypatch.setattr("chunkcache.cli.serve.load", load)
    before = signal.getsignal(signal.SIGTERM)
    code, told, error = run("serve", "/no/such/model")
    assert (code, told, error) == (0, "", "")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0"], "CHUNKCACHE_API_KEY"),
        (["--max-kv-bytes", "much"], "'much' is not a size"),
        (["--policy", "nope"], "no policy is called 'nope'"),
        (["--running", "0"], "0 is not in the range"),
    ],
)
def test_bad_options_are_told_before_the_model_is_loaded(run, options, says):
    code, _, error = run("serve", "/no/such/model", *options)
    assert code == 2
    assert says in error


def test_other_commands_do_without_what_the_server_needs():
    absent = ("fastapi", "httpx", "llguidance", "openai", "prometheus_client", "starlette", "uvicorn")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
from chunkcache.cli.main import cli
import click
context = click.Context(cli)
assert all(cli.get_command(context, name) for name in cli.list_commands(context))
cli.main(["serve", "/no/such/model"], standalone_mode=False)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "chunkcache serve needs" in ran.stderr, ran.stderr
    assert 'pip install "chunkcache[server]"' in ran.stderr
