"""What every test runs under: one thread, a fixed seed, quiet transformers, no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test downloads anything

import pytest
import torch
import transformers
from hypothesis import settings

torch.set_num_threads(1)  # tiny models are slower on several threads
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def fixed_seed():
    """Let every test start from the same random state, whichever ran before it."""
    torch.manual_seed(0)
