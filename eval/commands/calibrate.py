"""`chunkcache calibrate`: finds what `query`, its guard and `cachecraft:alpha=auto` need to know of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
from rich.markup import escape

from chunkcache.cli.console import err, out, progress, table
from chunkcache.errors import DocumentError
from chunkcache.eval.commands.inputs import cut_with_all
from chunkcache.eval.commands.options import (
    AsJson,
    FilledCaseOptions,
    ModelOptions,
    argument,
    check_policies,
    command,
    option,
)  # fmt: skip
from chunkcache.eval.commands.show import show_json

if TYPE_CHECKING:
    from chunkcache.engine.calibration import Calibration
    from chunkcache.eval.data import Case, DataSet


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(FilledCaseOptions):
    """A calibration, on packaged documents or on prompts of one data set, too."""

    data: Annotated[Path | None, argument()] = None
    target: Annotated[str, option(help="Policy whose fidelity cachecraft has to reach.")] = "cacheblend:ratio=0.15"
    guarded: Annotated[str, option(help="Query policy whose guard is fitted; query@neighbours for chunks that are "
                                   "computed behind their nearest of DATA.")] = "query"  # fmt: skip
    only: Annotated[str | None, option(type=click.Choice(["lead", "look", "guard", "cachecraft"]), help="Look for "
                                       "one of these; the others are left as they were.")] = None  # fmt: skip
    model: ModelOptions
    out: Annotated[Path | None, option(help="File to write; by default in the cache folder.")] = None
    as_json: AsJson = False


@command("calibrate")
def calibrate(options: CalibrateOptions) -> None:
    """Find out which lead-in and look at the question suit a model, and what policies need to know of it.

    With DATA, on its prompts, what query:guard=X and cachecraft:alpha=auto need.

    Without DATA it takes about a minute. What is found is used wherever the model is wrapped from then on.
    """
    from chunkcache.engine.calibration import load_calibration
    from chunkcache.eval.calibrate import PACKAGED, PARTS
    from chunkcache.eval.calibrate import calibrate as run
    from chunkcache.eval.data import DataSet

    check_policies((options.target, options.guarded))
    parts: tuple[str, ...] = PARTS if options.only is None else (options.only,)
    if options.data is None:
        if options.only in ("guard", "cachecraft"):
            raise DocumentError(f"--only {options.only} is fitted to prompts: pass DATA, too")
        parts = PACKAGED if options.only is None else (options.only,)
    source = None if options.data is None or set(parts) <= set(PACKAGED) else DataSet.read(options.data)
    cases = [] if source is None else _cases(options, source)
    model, tokenizer = options.model.load()
    cases, pool = ([], None) if source is None else cut_with_all(source, cases, options.chunk_tokens, tokenizer)
    with progress("calibrating") as on_step:
        fitted = run(model, tokenizer, cases, options.target, options.guarded, parts, on_step, pool)
    earlier = options.out if options.out and options.out.exists() else None
    fitted = fitted.over(load_calibration(fitted.fingerprint, earlier))
    path = fitted.save(options.out)
    if options.as_json:
        show_json({"file": str(path), **asdict(fitted)})
    else:
        _show_calibration(fitted)
        err.print(f"[dim]written to {escape(str(path))}[/]")


def _cases(options: CalibrateOptions, source: DataSet) -> list[Case]:
    cases = options.read(source)
    if len(cases) < 10:
        raise DocumentError(f"{len(cases)} prompts are too few for a calibration; pass --prompts 10 or more")
    return cases


def _show_calibration(fitted: Calibration) -> None:
    report = fitted.report
    if "lead" in report:
        found = report["lead"]
        rows = [["none", f"{found['kl_alone']:.4f}"], ["the packaged one", f"{found['kl_lead']:.4f}"]]
        title = f"lead-in of {fitted.lead} tokens ({found['answers']} answers, {found['seconds']:.0f} s)"
        out.print(table(title, ["lead-in", "KL mean"], rows))
    if "look" in report:
        _show_look(fitted)
    if "cachecraft" in report:
        craft = report["cachecraft"]
        rows = [
            [f"{r['alpha']}", f"{r['kl_first']:.4f}", f"{r['kl_mean']:.4f}", f"{r['recomputed_share']:.1%}"]
            for r in craft["tried"]
        ]
        rows.append([craft["target"], f"{craft['target_kl_first']:.4f}", f"{craft['target_kl_mean']:.4f}", ""])
        outcome = f"alpha = {fitted.alpha}" if craft["met"] else f"target not reached; alpha = {fitted.alpha}"
        out.print(table(f"cachecraft: {outcome}", ["alpha", "KL first", "KL mean", "recomputed"], rows))
    if "guard" in report:
        rows = [
            [f"{r['bound']}", f"{r['broken']:.1%}", f"{r['full']:.1%}", f"{r['passes']:.2f}", f"{r['kl_first']:.4f}"]
            for r in report["guard"]
        ]
        title = f"guard of {report['guarded']} (cross-validated)"
        out.print(table(title, ["bound", "broken", "full prefill", "passes", "KL first"], rows))


def _show_look(fitted: Calibration) -> None:
    from chunkcache.engine.look_check import BANDS

    found, look = fitted.report["look"], fitted.look
    if look is None:
        return
    rows = [[f"in layers {first:.2f} to {last:.2f} of the depth", "5.00%", f"{kl:.4f}"]
            for (first, last), kl in zip(BANDS, found["bands"], strict=True)]  # fmt: skip
    rows += [["in the best of them", f"{float(share):.2%}", f"{kl:.4f}"] for share, kl in found["shares"].items()]
    rows.append(
        ["by the question's words" if look.words else "by the question's words: left", "", f"{found['words']:.4f}"]
    )
    rows.append(["cacheblend, without a lead-in", "15.00%", f"{found['target']:.4f}"])
    title = (
        f"query looks in layers {look.first:.2f} to {look.last:.2f} of the depth, recomputes up to {look.most:.2%}, "
        f"from {look.least} tokens on ({found['seconds']:.0f} s)"
    )
    out.print(table(title, ["look", "recomputed", "KL mean"], rows))
