"""The command line: `chunkcache ask | check-model | serve | route | store`, and what other packages add (`bench`).

Answers and JSON go to stdout, everything else to stderr. Exit codes: 0 done, 1 failure, 2 bad input.
"""

from __future__ import annotations

import logging
import sys
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points

import click
from rich.logging import RichHandler

from chunkcache.cli.ask import ask, check_model
from chunkcache.cli.console import err
from chunkcache.cli.keys import make_key
from chunkcache.cli.route import route
from chunkcache.cli.serve import serve
from chunkcache.cli.store import list_entries, purge, stats, store_commands, verify
from chunkcache.cli.transfer import export_file, import_file, warm
from chunkcache.errors import ChunkCacheError, InputError

COMMANDS = "chunkcache.commands"  # entry points of this group are commands; each is imported when it is asked for


class _Commands(click.Group):
    """A group that finds more commands among entry points."""

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=COMMANDS)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(ctx), *self._entry_points})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of that name, imported if it comes from an entry point."""
        command = super().get_command(ctx, cmd_name)
        if command is None and cmd_name in self._entry_points:
            command = self._entry_points[cmd_name].load()
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="chunkcache")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens to stderr, and show tracebacks.")
def cli(verbose: bool) -> None:
    """Answer questions over documents, reusing the KV caches of retrieved chunks."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)])


cli.add_command(ask)
cli.add_command(check_model)
cli.add_command(serve)
cli.add_command(route)
cli.add_command(store_commands)
for command in (stats, list_entries, verify, purge, warm, export_file, import_file, make_key):
    store_commands.add_command(command)


def main() -> None:
    """Run the command line, turning errors into one line and an exit code."""
    verbose = bool({"-v", "--verbose"} & set(sys.argv[1:]))
    try:
        sys.exit(cli.main(prog_name="chunkcache", standalone_mode=False))
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends in one readable line
        if verbose:
            err.print_exception()
        known = isinstance(error, ChunkCacheError)
        _fail(str(error) if known else f"{type(error).__name__}: {error}", 2 if isinstance(error, InputError) else 1)


def _fail(message: str, code: int) -> None:
    one_line = " ".join(message.split())
    click.echo(f"error: {one_line}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
