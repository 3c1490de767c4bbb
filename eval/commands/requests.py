"""`chunkcache bench ttft`, `quality` and `heatmap`: requests one at a time, under policies and peers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from chunkcache.cli.console import err, out, progress, status, table, wide
from chunkcache.cli.inputs import load
from chunkcache.cli.options import json_option, model_options, options, out_option
from chunkcache.errors import DocumentError, PeerError
from chunkcache.eval.commands.inputs import read_cases, retrieved_cases

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from chunkcache.eval import Case, Results
    from chunkcache.eval.peers import Peer
    from chunkcache.eval.report.parts import Cell

COMPARED = ("full", "prefix", "reuse", "link:k=8", "cacheblend:ratio=0.15", "cachecraft", "query")

policies_option = click.option(
    "--policy", "policies", multiple=True, default=COMPARED, show_default=True, help="May be given several times."
)
peers_options = options(
    click.option("--peers", type=click.Path(path_type=Path, exists=True, file_okay=False),
                 help="Folder of `bench peers`: what is set up there is measured, too."),
    click.option("--peer-prompts", type=click.IntRange(1), help="Run them on the first so many prompts only."),
    click.option("--peer", "peer_names", multiple=True, help="Only this peer; may be given several times."),
)  # fmt: skip
prompt_options = options(
    click.option("--prompts", default=20, show_default=True, type=click.IntRange(1), help="Prompts to run."),
    click.option("--skip", default=0, show_default=True, type=click.IntRange(0), help="Prompts to leave out first."),
    click.option(
        "--questions",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="JSON Lines with question and answers: DATA is then a corpus that is searched for the chunks.",
    ),
    click.option("--fill", is_flag=True, help="Give cases with too few chunks some of other cases."),
)
compare_options = options(
    click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path)),
    click.option("--chunks", "counts", multiple=True, default=(5,), show_default=True, type=click.IntRange(1),
                 help="Chunks per prompt; may be given several times."),
    prompt_options,
    policies_option,
    peers_options,
    click.option("--chunk-tokens", type=click.IntRange(1), help="Cut chunks to so many tokens."),
    click.option("--store", "stores", multiple=True, default=("memory://?max_bytes=4GiB",), show_default=True,
                 help="URL of a store; may be given several times."),
    click.option("--cold", is_flag=True, help="Nothing is precomputed: requests compute their chunks on the clock."),
    click.option("--rounds", default=1, show_default=True, type=click.IntRange(1), help="Times each prompt is run."),
    model_options,
    out_option,
    json_option,
)  # fmt: skip


@dataclass(frozen=True)
class _Set:
    """Prompts, and the settings that tell them from others."""

    name: str
    cases: list[Case]
    about: dict[str, Any]


@click.command("ttft")
@compare_options
@click.option(
    "--tokens",
    "lengths",
    multiple=True,
    type=click.IntRange(1),
    help="Instead of --chunks: prompts of so many tokens of chunks; may be given several times.",
)
def bench_ttft(lengths: tuple[int, ...], **asked: Any) -> None:
    """Measure the time to first token on the prompts of DATA, against full prefill, and where it goes."""
    _run("ttft", asked, lengths)


@click.command("quality")
@compare_options
def bench_quality(**asked: Any) -> None:
    """Measure answers and fidelity to full prefill on the prompts of DATA, and the time to first token with them."""
    _run("quality", asked)


def _sets(asked: dict[str, Any], lengths: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[_Set]:
    """Return the prompts of each data file: with each number of chunks, or `prompts` of each length."""
    from chunkcache.eval.data import cut, prompts_of_lengths

    found = []
    for data in asked["data"]:
        about = _about(data, asked)
        if lengths:
            cases = prompts_of_lengths(
                read_cases(data, 0, 100, asked["skip"], quiet=True), lengths, asked["prompts"], tokenizer
            )
            found.append(_Set(f"{data.stem}-lengths", cases, {**about, "chunks": None, "tokens": list(lengths)}))
        for chunks in () if lengths else asked["counts"]:
            if asked["questions"] is not None:
                cases = retrieved_cases(data, asked["questions"], chunks, asked["chunk_tokens"] or 512,
                                        asked["prompts"], asked["skip"], tokenizer)  # fmt: skip
            else:
                cases = read_cases(data, chunks, asked["prompts"], asked["skip"], asked["fill"])
                cases = cut(cases, asked["chunk_tokens"], tokenizer)
            found.append(_Set(f"{data.stem}-{chunks}", cases, {**about, "chunks": chunks, "tokens": None}))
    return found


def _check(asked: dict[str, Any], lengths: Sequence[int]) -> None:
    """Refuse what cannot be measured, before the model is loaded."""
    from chunkcache.blend import parse_policy
    from chunkcache.eval.data import load_cases

    for policy in asked["policies"]:
        parse_policy(policy)
    stems = [data.stem for data in asked["data"]]
    for stem in stems:
        if stems.count(stem) > 1:
            raise DocumentError(f"two data files are called {stem!r}; results go by that name, so rename one")
    if asked["questions"] is not None and lengths:
        raise DocumentError("--tokens makes prompts of chunks as they come; leave --questions out")
    for data in () if asked["questions"] is not None else asked["data"]:
        load_cases(data, limit=1)


def _about(data: Path, asked: dict[str, Any]) -> dict[str, Any]:
    from chunkcache.eval.data import checksum

    questions = asked["questions"]
    return {
        "data": data.stem,
        "data_sha256": checksum(data),
        "questions_sha256": None if questions is None else checksum(questions),
        "skip": asked["skip"],
        "fill": asked["fill"],
        "chunk_tokens": asked["chunk_tokens"],
    }


def _run(bench: str, asked: dict[str, Any], lengths: Sequence[int] = ()) -> None:
    """Measure all sets over all stores, each into a file of its own, and show what they come to."""
    from chunkcache.eval import compare

    _check(asked, lengths)
    folder: Path | None = asked["out"]
    model, tokenizer = load(asked["model_name"], asked["device"], asked["dtype"])
    found: dict[str, Results] = {}
    with started_peers(asked["peers"], asked["peer_names"], asked["model_name"], model, tokenizer) as peers:
        for each in _sets(asked, lengths, tokenizer):
            for number, store in enumerate(asked["stores"], start=1):
                several = f"-{number}-{store.partition(':')[0]}" if len(asked["stores"]) > 1 else ""
                name = f"{bench}-{each.name}{several}"
                path = None if folder is None else folder / f"{name}.jsonl"
                with progress(name) as on_prompt:
                    found[name] = compare(
                        model, tokenizer, each.cases, asked["policies"], each.about, path, store,
                        asked["cold"], asked["rounds"], bench == "quality", peers, asked["peer_prompts"], on_prompt,
                    )  # fmt: skip
                if not asked["as_json"]:
                    show({name: found[name]})
    if asked["as_json"]:
        from chunkcache.eval.report import build_report

        click.echo(json.dumps(build_report(found), indent=2))


@contextmanager
def started_peers(
    folder: Path | None,
    names: Sequence[str],
    model_name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[list[Peer]]:
    """Start the peers of these names, or all that are set up; one that cannot serve the model is left out."""
    if folder is None:
        yield []
        return
    import torch

    from chunkcache.eval.peers import PEERS, Peer, peer_weights

    if model.device.type != "cpu":
        raise PeerError(f"peers run on the CPU, and the model is on {model.device}: pass --device cpu with --peers")
    with ExitStack() as running:
        found = []
        for name in names or PEERS:
            try:
                with status(f"starting {name}"):
                    weights = peer_weights(name, folder.absolute(), model_name, model, tokenizer)
                    peer = Peer.start(name, folder.absolute(), weights, torch.get_num_threads())
            except PeerError as error:
                err.print(f"[yellow]without {name}:[/] {escape(str(error))}")
            else:
                found.append(running.enter_context(peer))
        yield found


def show(results: dict[str, Results]) -> None:
    """Print the tables of some results, as the report has them."""
    from chunkcache.eval.report import build_report
    from chunkcache.eval.report.sections import views

    def text(cell: Cell) -> str:
        return escape(f"{cell.text} {cell.note}".strip())

    for view in views(build_report(results)):
        out.print(f"\n[bold]{escape(view.title)}[/]: {escape(view.lead)}")
        for each in view.tables:
            wide(table(each.title, each.columns, [[text(cell) for cell in row] for row in each.rows]))


@click.command("heatmap")
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.option("--chunks", default=4, show_default=True, type=click.IntRange(1), help="Chunks of the prompt.")
@click.option("--prompt", default=0, show_default=True, type=click.IntRange(0), help="Which prompt of DATA.")
@policies_option
@model_options
@out_option
@json_option
def bench_heatmap(
    data: Path | None,
    chunks: int,
    prompt: int,
    policies: Sequence[str],
    model_name: str,
    device: str | None,
    dtype: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Note which tokens of a prompt each policy recomputes: one of DATA, or one over the example documents."""
    from chunkcache.eval.data import checksum
    from chunkcache.eval.heatmap import heatmap
    from chunkcache.eval.report import build_report

    case = _example(chunks) if data is None else read_cases(data, chunks, 1, prompt)[0]
    about: dict[str, Any] = {"data": None, "chunks": chunks}
    if data is not None:
        about = {"data": data.stem, "data_sha256": checksum(data), "prompt": prompt, "chunks": chunks}
    model, tokenizer = load(model_name, device, dtype)
    with status("prefilling"):
        path = None if out is None else out / "heatmap.jsonl"
        found = heatmap(model, tokenizer, case, list(dict.fromkeys(policies)), about, path)
    if as_json:
        click.echo(json.dumps(build_report({"heatmap": found}), indent=2))
        return
    rows = []
    for policy in found.settings["policies"]:
        shares = [row["share"] for row in found.rows if row["policy"] == policy and row["role"].startswith("chunk")]
        touched = sum(share > 0 for share in shares)
        rows.append([policy, str(len(shares)), str(touched), f"{sum(shares) / len(shares):.1%}"])
    wide(table("tokens of the chunks", ["policy", "tokens", "recomputed", "share of token-layers"], rows))


def _example(chunks: int) -> Case:
    """Return the first packaged question, over pieces of the document that answers it and of others."""
    from chunkcache.eval import Case
    from chunkcache.eval.commands.inputs import EXAMPLES
    from chunkcache.retriever import load_documents

    first = json.loads((EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    documents = load_documents(EXAMPLES / "corpus")
    best = sorted(documents, key=lambda document: -sum(a.lower() in document.text.lower() for a in first["answers"]))
    return Case(first["question"], tuple(document.text[:1000] for document in best[:chunks]), tuple(first["answers"]))
