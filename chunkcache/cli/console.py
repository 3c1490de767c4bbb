"""Progress and tables of the command line, and numbers as people read them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
PRINT_EVERY_S = 30.0  # between lines of progress where there is no terminal
SPEED_PERIOD_S = 3600.0  # that the time left is estimated from: steps take up to minutes


class Bar:
    """A progress bar: call it with (done, total). Where there is no terminal, a line now and then."""

    def __init__(self, bars: Progress, label: str) -> None:
        self._bars = bars
        self._task = bars.add_task(label, total=None)
        self._printed_at = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        self._bars.update(self._task, completed=done, total=total)
        if not err.is_terminal and time.monotonic() - self._printed_at > PRINT_EVERY_S:
            self._printed_at = time.monotonic()
            task = self._bars.tasks[self._task]
            left = "" if task.time_remaining is None else f", {span_text(task.time_remaining)} left"
            err.print(f"{task.description}: {done} of {total}{left}")

    def say(self, label: str) -> None:
        """Change the text beside it."""
        self._bars.update(self._task, description=label)


@contextmanager
def progress(label: str) -> Iterator[Bar]:
    """Show a progress bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, speed_estimate_period=SPEED_PERIOD_S) as bars:
        yield Bar(bars, label)


@contextmanager
def status(label: str) -> Iterator[Callable[[str], None]]:
    """Show what is going on on stderr; yields a callback that changes the text."""
    with err.status(label) as spinner:
        yield spinner.update


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        made.add_row(*row)
    return made


def wide(made: Table) -> None:
    """Print a table whose cells are not to be shortened, however narrow the terminal is."""
    width = Measurement.get(out, out.options.update(width=1000), made).maximum
    Console(highlight=False, width=max(out.width, width)).print(made)


def size_text(nbytes: float) -> str:
    """Return a number of bytes as people read it, such as `12.3 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def span_text(seconds: float) -> str:
    """Return a span of time in its largest whole unit, such as `3h`."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}{unit}"
    return f"{max(int(seconds), 0)}s"
