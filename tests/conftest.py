"""What every test runs under: one thread, a fixed seed, quiet transformers, no network."""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test downloads anything
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start, which shares the cores with other tests
os.environ["LANGSMITH_TRACING"] = os.environ["LANGCHAIN_TRACING_V2"] = "false"  # nor sends anything

import pytest
import torch
import transformers
from hypothesis import settings

from chunkcache.cli import main as cli

torch.set_num_threads(1)  # tiny models are slower on several threads
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def fixed_seed():
    """Let every test start from the same random state, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Run the command line; returns exit code, stdout and stderr."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["chunkcache", *args])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def browser():
    """The Chromium that is installed; tests of pages are skipped where there is none."""
    from support.browser import launched

    with launched() as started:
        yield started
