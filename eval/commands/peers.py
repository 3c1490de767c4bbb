"""The `chunkcache bench peers` command: sets up the systems that are measured beside ours."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.markup import escape

from chunkcache.cli.console import out, status, table, wide
from chunkcache.cli.options import json_option
from chunkcache.errors import ChunkCacheError


@click.command("peers")
@click.option(
    "--into",
    "folder",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for their environments, one each; about 3 GB for all.",
)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@json_option
def bench_peers(folder: Path, names: tuple[str, ...], as_json: bool) -> None:
    """Set up peers (transformers, transformers-prefix, kvboost, kvboost-cacheblend, llama.cpp), by default all.

    Each is installed by pip, with pinned versions, into an environment of its own. One that cannot be installed here
    is skipped. pip's own settings hold: on Linux, without a GPU, let PIP_FIND_LINKS or PIP_INDEX_URL lead it to the
    CPU build of PyTorch, which is several GB smaller.
    """
    from chunkcache.eval.peers import PEERS, setup_peers

    with status("looking at what is there") as on_status:
        found = setup_peers(folder.absolute(), names, on_status)
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found], indent=2))
    else:
        rows = [[each.name, PEERS[each.name].about, _versions(each.versions)] for each in found if not each.skipped]
        if rows:
            wide(table(f"peers in {folder}", ["peer", "what it does", "versions"], rows))
        for each in found:
            if each.skipped:
                out.print(f"[yellow]skipped {each.name}:[/] {escape(each.skipped)}")
    if all(each.skipped for each in found):
        raise ChunkCacheError(f"no peer could be set up in {folder}; the reasons stand above")


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
