"""The `chunkcache bench peers` command: sets up the systems that are measured beside ours."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from rich.markup import escape

from chunkcache.cli.console import out, status, table, wide
from chunkcache.errors import ChunkCacheError
from chunkcache.eval.commands.options import FOLDER, AsJson, argument, command, option
from chunkcache.eval.commands.show import show_json


@dataclass(frozen=True, kw_only=True)
class SetUpOptions:
    """Environments of peers."""

    folder: Annotated[Path, option("--into", type=FOLDER, help="Folder for their environments, one each; about 3 GB "
                                   "for all.")]  # fmt: skip
    names: Annotated[tuple[str, ...], argument(metavar="[NAME]...")] = ()
    as_json: AsJson = False


@command("peers")
def bench_peers(options: SetUpOptions) -> None:
    """Set up peers (transformers, transformers-prefix, kvboost, kvboost-cacheblend, llama.cpp), by default all.

    Each is installed by pip, with pinned versions, into an environment of its own. One that cannot be installed here
    is skipped. pip's own settings hold: on Linux, without a GPU, let PIP_FIND_LINKS or PIP_INDEX_URL lead it to the
    CPU build of PyTorch, which is several GB smaller.
    """
    from chunkcache.eval.peers import PEERS, setup_peers

    folder = options.folder
    with status("looking at what is there") as on_status:
        outcomes = setup_peers(folder.absolute(), options.names, on_status)
    if options.as_json:
        show_json([asdict(peer) for peer in outcomes])
    else:
        rows = [
            [peer.name, PEERS[peer.name].about, _versions(peer.versions)] for peer in outcomes if not peer.skipped
        ]
        if rows:
            wide(table(f"peers in {folder}", ["peer", "what it does", "versions"], rows))
        for peer in outcomes:
            if peer.skipped:
                out.print(f"[yellow]skipped {peer.name}:[/] {escape(peer.skipped)}")
    if all(peer.skipped for peer in outcomes):
        raise ChunkCacheError(f"no peer could be set up in {folder}; the reasons stand above")


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
