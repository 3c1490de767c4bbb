"""Options that several commands of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click

STORE_VARIABLE = "CHUNKCACHE_STORE"  # environment variable


def options(*each: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a decorator that adds all of these arguments and options to a command, in their order."""
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(each), command)


device_options = options(
    click.option("--device", help="cpu, cuda, cuda:1, mps; the fastest there is by default."),
    click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
)
model_options = options(
    click.option("--model", "model_name", default="smollm2-135m-instruct", show_default=True,
                 help="Alias, local folder, GGUF file or Hugging Face id."),
    device_options,
)  # fmt: skip
chunk_tokens_option = click.option(
    "--chunk-tokens", default=256, show_default=True, type=click.IntRange(32), help="Length of a chunk at most."
)
retrieval_options = options(
    click.option("--top-k", default=4, show_default=True, type=click.IntRange(1), help="Chunks per prompt."),
    chunk_tokens_option,
)
policy_option = click.option(
    "--policy", default="query", show_default=True, help="Which reused tokens are recomputed."
)
system_option = click.option("--system", help="System prompt; the chat template's own by default.")
data_options = options(
    click.argument("data", type=click.Path(path_type=Path)),
    click.option("--chunks", default=5, show_default=True, type=click.IntRange(0),
                 help="Chunks per prompt; 0 for all of each, two or more."),
    click.option("--prompts", default=20, show_default=True, type=click.IntRange(1), help="Prompts to run."),
    click.option("--skip", default=0, show_default=True, type=click.IntRange(0), help="Prompts to leave out first."),
)  # fmt: skip
store_option = click.option(
    "--store", "url", envvar=STORE_VARIABLE, show_envvar=True, required=True, help="URL of the chunk KV store."
)
where_options = options(
    click.option("--model", help="Only those of this model: its fingerprint or the start of it, as ls shows it."),
    click.option("--tenant", metavar="NAME", help="Only those of this tenant."),
    click.option("--document", metavar="ID", help="Only those computed from this document."),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
out_option = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the results: rows are kept there as they come, and an interrupted run goes on.",
)  # fmt: skip
json_file_option = click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write meta data and all rows here."
)
