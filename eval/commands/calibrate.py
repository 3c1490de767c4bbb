"""`chunkcache calibrate`: fits what `cachecraft:alpha=auto` and a fidelity guard need to know of a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from chunkcache.cli.console import err, progress, table
from chunkcache.cli.console import out as console
from chunkcache.cli.inputs import load
from chunkcache.cli.options import data_options, json_option, model_options
from chunkcache.errors import DocumentError
from chunkcache.eval.commands.inputs import read_cases


@click.command()
@data_options
@click.option(
    "--target",
    default="cacheblend:ratio=0.15",
    show_default=True,
    help="Policy whose fidelity cachecraft has to reach.",
)
@click.option("--guarded", default="query", show_default=True, help="Query policy whose guard is fitted.")
@click.option(
    "--only", type=click.Choice(["guard", "cachecraft"]), help="Look for one of both; the other is left as it was."
)
@model_options
@click.option("--out", type=click.Path(path_type=Path), help="File to write; by default in the cache folder.")
@json_option
def calibrate(
    data: Path,
    chunks: int,
    prompts: int,
    skip: int,
    target: str,
    guarded: str,
    only: str | None,
    model_name: str,
    device: str | None,
    dtype: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Find what cachecraft:alpha=auto and query:guard=X need to know of a model, on prompts of DATA."""
    from chunkcache.blend import parse_policy
    from chunkcache.engine.calibration import load_calibration
    from chunkcache.eval.calibrate import PARTS
    from chunkcache.eval.calibrate import calibrate as run

    for policy in (target, guarded):
        parse_policy(policy)
    cases = read_cases(data, chunks, prompts, skip)
    if len(cases) < 10:
        raise DocumentError(f"{len(cases)} prompts are too few for a calibration; pass --prompts 10 or more")
    model, tokenizer = load(model_name, device, dtype)
    with progress("calibrating") as on_step:
        found = run(model, tokenizer, cases, target, guarded, (only,) if only else PARTS, on_step)
    found = found.over(load_calibration(found.fingerprint, out if out and out.exists() else None))
    path = found.save(out)
    if as_json:
        click.echo(json.dumps({"file": str(path), **asdict(found)}, indent=2))
    else:
        _show_calibration(found.report, found.alpha)
        err.print(f"[dim]written to {escape(str(path))}[/]")


def _show_calibration(report: dict[str, Any], alpha: float | None) -> None:
    if "cachecraft" in report:
        craft = report["cachecraft"]
        rows = [
            [f"{r['alpha']}", f"{r['kl_first']:.4f}", f"{r['kl_mean']:.4f}", f"{r['recomputed_share']:.1%}"]
            for r in craft["tried"]
        ]
        rows.append([craft["target"], f"{craft['target_kl_first']:.4f}", f"{craft['target_kl_mean']:.4f}", ""])
        found = f"alpha = {alpha}" if craft["met"] else f"target not reached; alpha = {alpha}"
        console.print(table(f"cachecraft: {found}", ["alpha", "KL first", "KL mean", "recomputed"], rows))
    if "guard" in report:
        rows = [
            [f"{r['bound']}", f"{r['broken']:.1%}", f"{r['full']:.1%}", f"{r['passes']:.2f}", f"{r['kl_first']:.4f}"]
            for r in report["guard"]
        ]
        title = f"guard of {report['guarded']} (cross-validated)"
        console.print(table(title, ["bound", "broken", "full prefill", "passes", "KL first"], rows))
