"""`chunkcache calibrate`: fits what `cachecraft:alpha=auto` and a fidelity guard need to know of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import click
from rich.markup import escape

from chunkcache.cli.console import err, out, progress, table
from chunkcache.errors import DocumentError
from chunkcache.eval.commands.options import AsJson, ModelOptions, PromptOptions, check_policies, command, option
from chunkcache.eval.commands.show import show_json


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(PromptOptions):
    """A calibration on prompts of one data set."""

    target: Annotated[str, option(help="Policy whose fidelity cachecraft has to reach.")] = "cacheblend:ratio=0.15"
    guarded: Annotated[str, option(help="Query policy whose guard is fitted.")] = "query"
    only: Annotated[str | None, option(type=click.Choice(["guard", "cachecraft"]), help="Look for one of both; the "
                                       "other is left as it was.")] = None  # fmt: skip
    model: ModelOptions
    out: Annotated[Path | None, option(help="File to write; by default in the cache folder.")] = None
    as_json: AsJson = False


@command("calibrate")
def calibrate(options: CalibrateOptions) -> None:
    """Find what cachecraft:alpha=auto and query:guard=X need to know of a model, on prompts of DATA."""
    from chunkcache.engine.calibration import load_calibration
    from chunkcache.eval.calibrate import PARTS
    from chunkcache.eval.calibrate import calibrate as run

    check_policies((options.target, options.guarded))
    cases = options.cases()
    if len(cases) < 10:
        raise DocumentError(f"{len(cases)} prompts are too few for a calibration; pass --prompts 10 or more")
    model, tokenizer = options.model.load()
    parts = PARTS if options.only is None else (options.only,)
    with progress("calibrating") as on_step:
        fitted = run(model, tokenizer, cases, options.target, options.guarded, parts, on_step)
    earlier = options.out if options.out and options.out.exists() else None
    fitted = fitted.over(load_calibration(fitted.fingerprint, earlier))
    path = fitted.save(options.out)
    if options.as_json:
        show_json({"file": str(path), **asdict(fitted)})
    else:
        _show_calibration(fitted.report, fitted.alpha)
        err.print(f"[dim]written to {escape(str(path))}[/]")


def _show_calibration(report: dict[str, Any], alpha: float | None) -> None:
    if "cachecraft" in report:
        craft = report["cachecraft"]
        rows = [
            [f"{r['alpha']}", f"{r['kl_first']:.4f}", f"{r['kl_mean']:.4f}", f"{r['recomputed_share']:.1%}"]
            for r in craft["tried"]
        ]
        rows.append([craft["target"], f"{craft['target_kl_first']:.4f}", f"{craft['target_kl_mean']:.4f}", ""])
        outcome = f"alpha = {alpha}" if craft["met"] else f"target not reached; alpha = {alpha}"
        out.print(table(f"cachecraft: {outcome}", ["alpha", "KL first", "KL mean", "recomputed"], rows))
    if "guard" in report:
        rows = [
            [f"{r['bound']}", f"{r['broken']:.1%}", f"{r['full']:.1%}", f"{r['passes']:.2f}", f"{r['kl_first']:.4f}"]
            for r in report["guard"]
        ]
        title = f"guard of {report['guarded']} (cross-validated)"
        out.print(table(title, ["bound", "broken", "full prefill", "passes", "KL first"], rows))
