"""The command: runs the sections one by one, each within its time, and prints the tables at the end."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from chunkcache.eval.gpu.check import Check, Options, OutOfTime, described
from chunkcache.eval.gpu.decode import decode
from chunkcache.eval.gpu.environment import environment
from chunkcache.eval.gpu.exactness import exactness
from chunkcache.eval.gpu.kernels import kernels
from chunkcache.eval.gpu.launches import launches
from chunkcache.eval.gpu.made import SIZES
from chunkcache.eval.gpu.memory import memory
from chunkcache.eval.gpu.sanitizer import sanitizer
from chunkcache.eval.gpu.selfcheck import selfcheck
from chunkcache.eval.gpu.tiers import tiers
from chunkcache.eval.gpu.triton_kernels import triton
from chunkcache.eval.gpu.ttft import ttft


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        run: what it does.
        share: its share of the time, in seconds of the default budget.
    """

    run: Callable[[Check], None]
    share: float


SECTIONS = {
    "environment": Section(environment, 10),
    "exactness": Section(exactness, 80),
    "selfcheck": Section(selfcheck, 30),
    "ttft": Section(ttft, 100),
    "launches": Section(launches, 45),
    "tiers": Section(tiers, 50),
    "decode": Section(decode, 25),
    "memory": Section(memory, 25),
    "kernels": Section(kernels, 25),
    "triton": Section(triton, 30),
    "sanitizer": Section(sanitizer, 40),
}
LAST = 5.0  # seconds without which no section is begun


def run(options: Options, names: Iterable[str] = tuple(SECTIONS)) -> Check:
    """Run these sections; return the check with its report, which is written after each.

    A section has its share of the time, and what those before it left; at twice as much it is broken off.
    """
    check = Check(options)
    names = tuple(names)
    scale = options.budget / sum(SECTIONS[name].share for name in names)
    end = 0.0
    for name in names:
        section = SECTIONS[name]
        share = section.share * scale
        end += share
        spent = check.report.elapsed
        total = options.budget - spent
        if total < LAST:
            check.report.add_left_out(f"section {name}")
            continue
        check.report.say(f"--- {name}")
        seconds = min(max(share, end - spent), total)
        try:
            with check.within(seconds, at_most=min(2 * seconds, total)):
                section.run(check)
        except OutOfTime:
            check.report.add_left_out(f"the rest of section {name}, which was broken off")
        except Exception as error:  # noqa: BLE001 - the other sections are worth having
            check.report.add_problem(f"{name}: {described(error)}")
            traceback.print_exc(limit=-4)
        check.report.seconds[name] = check.report.elapsed - spent
        check.report.write()
        check.free()
    return check


def failed(check: Check) -> bool:
    """Return whether something is wrong, or in a smoke run amiss."""
    return bool(check.report.wrong) or (check.options.smoke and bool(check.report.problems))


@click.command(help=__doc__)
@click.option("--smoke", is_flag=True, help="Toy sizes on the CPU, to prove that all of it runs.")
@click.option("--only", default=",".join(SECTIONS), show_default=True, help="Sections, with commas between.")
@click.option("--budget", default=450.0, show_default=True, help="Seconds for everything.")
@click.option("--size", default="8b", show_default=True, type=click.Choice(list(SIZES)), help="Of the main model.")
@click.option("--device", default=None, help="Such as cuda:1; by default cuda:0, or the CPU where there is none.")
@click.option(
    "--out", default="gpu-check.json", show_default=True, type=click.Path(path_type=Path), help="JSON file."
)
def main(smoke: bool, only: str, budget: float, size: str, device: str | None, out: Path) -> None:
    """Run the check and exit: 0 if nothing is wrong, else 1."""
    names = [name for name in only.split(",") if name]
    unknown = sorted(set(names) - set(SECTIONS))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: there are {', '.join(SECTIONS)}", param_hint="--only")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = Options(smoke, "cpu" if smoke and device is None else device, size, budget, out)
    with _only_errors(logging.getLogger("chunkcache")):
        check = run(options, names)
    print("\n" + check.report.markdown())
    print(f"\n{len(check.report.wrong)} wrong, {len(check.report.problems)} problems, figures in {out}")
    sys.exit(1 if failed(check) else 0)


@contextmanager
def _only_errors(logger: logging.Logger) -> Iterator[None]:
    """Keep warnings out of the figures: what a fallback costs is among them."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
