"""Small chunk KV, every tier that needs no server, ready to use, and other processes that use it too."""

from __future__ import annotations

import atexit
import json
import os
import pkgutil
import subprocess
import sys
import textwrap
import traceback
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from chunkcache.kv import ChunkKey, ChunkKV
from chunkcache.kv.options import call_with_options
from chunkcache.store import TIERS, DiskStore, MemoryStore

SIZE = 2 * 2 * 4  # bytes of one token in `kv`
LOCAL = ("device", "memory", "disk")


def key(*token_ids, tenant=""):
    return ChunkKey.of("model", (), token_ids, tenant)


def kv(*token_ids, fill=1.0, **origin):
    made = ChunkKV.of(token_ids, 3, [torch.full((2, 1, len(token_ids), 1), fill + i) for i in range(2)])
    return replace(made, origin=replace(made.origin, **origin))


def random_kv(tokens=5, layers=3, heads=2, dim=8, position=3, dtype=torch.float32):
    return ChunkKV.of(range(tokens), position, [torch.randn(2, heads, tokens, dim).to(dtype) for _ in range(layers)])


def open_tier(scheme, tmp_path, **options):
    if scheme == "device":
        options["device"] = "cpu"
    if scheme == "disk":
        return disk_store(tmp_path / "store", **options)
    return with_options(pkgutil.resolve_name(TIERS[scheme]), **options)


def with_options(tier, **options):
    """Open a tier by its options, as a URL does."""
    return call_with_options(tier, options)


def disk_store(folder, **options):
    return with_options(DiskStore, path=str(folder), **{"sync": "no", **options})


def memory_store(max_bytes=None, **options):
    return with_options(MemoryStore, max_bytes=max_bytes, **options)


def same(a, b):
    return (a.token_ids, a.position) == (b.token_ids, b.position) and all(
        torch.equal(x, y) for x, y in zip(a.layers, b.layers, strict=True)
    )


_NURSERY = """
import json, os, sys, traceback
sys.path[:0] = sys.argv[1:]
from support.store import *
for line in sys.stdin:
    body, output, *arguments = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = ["", *arguments]
        try:
            exec(body)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
_TESTS = Path(__file__).parents[1]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
IMPORTS = [str(_TESTS), str(_TESTS.parent)]


@cache
def _nursery():
    """A process that has imported all that takes long, and forks one for each program."""
    command = [sys.executable, "-W", "ignore", "-c", _NURSERY, *IMPORTS]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=QUIET)
    atexit.register(process.communicate)
    return process


def in_process(body, tmp_path, *arguments):
    """Run the text of a Python program in a process of its own, with the names of this file and in `sys.argv[1:]`
    `tmp_path` and the arguments; return what it wrote to stderr.

    It can fork more: `forked(function, ...)` returns a child's number, and `joined(*children)` fails if one of them
    did.
    """
    output = tmp_path / "stderr"
    _nursery().stdin.write(json.dumps([textwrap.dedent(body), *map(str, (output, tmp_path, *arguments))]) + "\n")
    _nursery().stdin.flush()
    code = _nursery().stdout.readline()
    assert code == "0\n", output.read_text()
    return output.read_text()


def in_new_interpreter(body, *arguments, before=()):
    """Run such a program in an interpreter of its own, by the command `before` if it needs one; return its stderr."""
    head = f"import sys\nsys.path[:0] = {IMPORTS!r}\nfrom support.store import *\n"
    command = [*before, sys.executable, "-W", "ignore", "-c", head + textwrap.dedent(body), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=QUIET)
    assert done.returncode == 0, done.stderr
    return done.stderr


def forked(function, *arguments):
    child = os.fork()
    if child:
        return child
    try:
        function(*arguments)
    except BaseException:  # noqa: BLE001 - whatever it is, the parent must not go on in here
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def joined(*children):
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), codes
