"""What deploy/ has: that it can be read, and names commands, options, variables and extras that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from chunkcache.cli.main import cli
from chunkcache.cli.serve import KEY_VARIABLE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
UNIT = (DEPLOY / "chunkcache.service").read_text(encoding="utf-8")


def check(words):
    """Check a command line of chunkcache: its command, its options, and what stands behind them."""
    assert words[0].rpartition("/")[2] == "chunkcache"
    command = cli.get_command(click.Context(cli), words[1])
    known = {flag for parameter in command.params for flag in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
    return command.make_context(words[1], [str(word) for word in words[2:]])


def listed(instruction):
    [line] = re.findall(rf"^{instruction} (\[.*\])$", DOCKERFILE, re.M)
    return yaml.safe_load(line)


def test_the_image_starts_the_server_and_installs_extras_that_there_are():
    context = check([*listed("ENTRYPOINT"), "/models/m"])
    assert (context.params["host"], context.params["port"]) == ("0.0.0.0", 8000)
    [named] = re.findall(r'"\.\[(.*)\]"', DOCKERFILE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(named.split(",")) <= extras.keys()
    assert "USER 10001" in DOCKERFILE
    assert (ROOT / "constraints.txt").exists()


def test_the_services_are_started_as_they_can_be():
    services = COMPOSE["services"]
    servers = [name for name in services if name.startswith("server-")]
    for name in servers:
        words = [re.sub(r"\$\{\w+:-(.*?)\}|\$\{\w+:\?.*?\}", r"\1", word) for word in services[name]["command"]]
        context = check([*listed("ENTRYPOINT"), *(word or "/models/m" for word in words)])
        assert "redis://valkey:6379" in context.params["store"]
        assert KEY_VARIABLE in services[name]["environment"]
        assert services[name]["read_only"]
        assert int(services[name]["stop_grace_period"][:-1]) > context.params["drain"]
    router = check([*services["router"]["entrypoint"], *services["router"]["command"]])
    assert set(router.params["urls"]) == {f"http://{name}:8000" for name in servers}
    assert services["router"]["ports"] == [f"127.0.0.1:8080:{router.params['port']}"]
    assert all(service["cap_drop"] == ["ALL"] for service in services.values())


def test_the_unit_drains_and_is_nobodys_but_its_own():
    [line] = re.findall(r"^ExecStart=(.*)$", UNIT, re.M)
    values = dict(re.findall(r"^Environment=(\w+)=(.*)$", UNIT, re.M))
    context = check([re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], word) for word in line.split()])
    stop = int(*re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.M))
    assert stop > context.params["drain"]
    assert context.params["host"] == "127.0.0.1"
    for setting in ("DynamicUser=yes", "ProtectSystem=strict", "NoNewPrivileges=yes", "KillSignal=SIGTERM"):
        assert f"\n{setting}\n" in UNIT


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
def test_systemd_reads_the_unit(tmp_path):
    unit = tmp_path / "chunkcache.service"
    unit.write_text(UNIT.replace("/opt/chunkcache/bin/chunkcache", shutil.which("true")))
    ran = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert "chunkcache.service" not in ran.stderr
    assert ran.returncode == 0, ran.stderr
