"""`chunkcache bench ttft`, `quality` and `heatmap`: requests one at a time, under policies and peers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import click
from rich.markup import escape

from chunkcache.cli.console import err, progress, status, table, wide
from chunkcache.cli.inputs import indexed
from chunkcache.errors import DocumentError, InputError, PeerError, PolicyError
from chunkcache.eval.commands.inputs import EXAMPLES, about, cut_with_all, draw_questions, read_cases, retrieved_cases
from chunkcache.eval.commands.options import (
    Against,
    ModelOptions,
    OutputOptions,
    Policies,
    argument,
    check_policies,
    command,
    count,
    option,
)  # fmt: skip
from chunkcache.eval.commands.show import show_json, show_overview, show_report
from chunkcache.eval.fidelity import ANSWER_TOKENS
from chunkcache.eval.results import FULL, PLAIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from chunkcache.eval import Case, Results
    from chunkcache.eval.data import DataSet
    from chunkcache.eval.peers import Build, Peer

SET_UP = click.Path(path_type=Path, exists=True, file_okay=False)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
STORES = ("memory://?max_bytes=4GiB",)
COMPARED = ("full", "prefix", "reuse", "link:k=8", "cacheblend:ratio=0.15", "cachecraft", "query")
TIMED = (PLAIN, *COMPARED)


@dataclass(frozen=True, kw_only=True)
class PeerOptions:
    """The peers that are measured, too."""

    folder: Annotated[Path | None, option("--peers", type=SET_UP, help="Folder of `bench peers`: what is set up "
                                          "there is measured, too.")] = None  # fmt: skip
    peer_prompts: Annotated[int | None, count("Run them on the first so many prompts only.")] = None
    peer_names: Annotated[tuple[str, ...], option("--peer", help="Only this peer; may be given several times.")] = ()


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """Requests one at a time."""

    data: Annotated[tuple[Path, ...], argument()]
    counts: Annotated[tuple[int, ...], count("Chunks per prompt; may be given several times.", "--chunks")] = (5,)
    prompts: Annotated[int, count("Prompts to run.")] = 20
    skip: Annotated[int, count("Prompts to leave out first.", least=0)] = 0
    questions: Annotated[Path | None, option(type=FILE, help="JSON Lines with question and answers: DATA is then a "
                                             "corpus that is searched for the chunks.")] = None  # fmt: skip
    fill: Annotated[bool, option(help="Give cases with too few chunks some of other cases.")] = False
    least_tokens: Annotated[int | None, count("Leave out prompts of fewer tokens in their chunks.")] = None
    policies: Policies = TIMED
    against: Against = FULL
    peers: PeerOptions = PeerOptions()
    builds: Annotated[tuple[Path, ...], option("--build", type=SET_UP, help="Git clone of chunkcache at another "
                                               "commit, whose default policy is measured, too; may be given several "
                                               "times.")] = ()  # fmt: skip
    chunk_tokens: Annotated[int | None, count("Cut chunks to so many tokens.")] = None
    stores: Annotated[tuple[str, ...], option("--store", help="URL of a store; may be given several times.")] = STORES
    cold: Annotated[bool, option(help="Nothing is precomputed: requests compute their chunks on the clock.")] = False
    rounds: Annotated[int, count("Times each prompt is run.")] = 1
    model: ModelOptions
    output: OutputOptions

    def about(self, data: Path) -> dict[str, Any]:
        """Return the settings that tell the prompts of a data file from others."""
        from chunkcache.eval.data import checksum

        questions = None if self.questions is None else checksum(self.questions)
        return {
            **about(data), "questions_sha256": questions, "skip": self.skip, "fill": self.fill,
            "chunk_tokens": self.chunk_tokens, "least_tokens": self.least_tokens,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TtftOptions(RequestOptions):
    """Requests one at a time, also of growing lengths."""

    lengths: Annotated[tuple[int, ...], count("Instead of --chunks: prompts of so many tokens of chunks; may be "
                                              "given several times.", "--tokens")] = ()  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QualityOptions(RequestOptions):
    """Requests one at a time, with their answers."""

    answer_tokens: Annotated[int, count("Length of an answer at most.")] = ANSWER_TOKENS


@command("ttft")
def bench_ttft(options: TtftOptions) -> None:
    """Measure the time to first token on the prompts of DATA, against full prefill, and where it goes."""
    if options.questions is not None and options.lengths:
        raise DocumentError("--tokens makes prompts of chunks as they come; leave --questions out")
    _measure("ttft", options, options.lengths)


@command("quality")
def bench_quality(options: QualityOptions) -> None:
    """Measure answers and fidelity to full prefill on the prompts of DATA, and the time to first token with them."""
    _measure("quality", options, answer_tokens=options.answer_tokens)


def _measure(bench: str, options: RequestOptions, lengths: Sequence[int] = (), answer_tokens: int = 0) -> None:
    """Measure all prompts over all stores, each into a file of its own, and show what they come to.

    Without `answer_tokens`, only the time to first token is measured.
    """
    from chunkcache.eval import Comparison, compare
    from chunkcache.eval.neighbours import ChunkPool
    from chunkcache.eval.peers import build_name
    from chunkcache.eval.report import build_report

    check_policies(name for name in options.policies if name != PLAIN)
    if options.against not in (FULL, *options.policies, *map(build_name, options.builds)):
        raise PolicyError(f"--against {options.against} is not measured; pass --policy {options.against}, too")
    if options.cold and options.builds:
        raise InputError("--cold empties stores before each request, and another build has its own: drop --build")
    sources = _sources(options)
    model, tokenizer = options.model.load()
    found: dict[str, Results] = {}
    with (
        started_peers(options.peers, options.model.model_name, model, tokenizer) as peers,
        started_builds(options.builds, model, tokenizer) as builds,
    ):
        for prompts, cases, pool, settings in _prompts(options, lengths, sources, tokenizer):
            for number, store in enumerate(options.stores, start=1):
                several = f"-{number}-{store.partition(':')[0]}" if len(options.stores) > 1 else ""
                name = f"{bench}-{prompts}{several}"
                comparison = Comparison(
                    options.policies, store, options.cold, options.rounds, answer_tokens > 0,
                    options.peers.peer_prompts, answer_tokens, ChunkPool(pool).nearest,
                )  # fmt: skip
                with progress(name) as on_prompt:
                    found[name] = compare(
                        model, tokenizer, cases, comparison, about=settings, path=options.output.path(name),
                        peers=[*builds, *peers], on_prompt=on_prompt,
                    )  # fmt: skip
                if not options.output.as_json:
                    show_report({name: found[name]}, options.against)
    if options.output.as_json:
        show_json(build_report(found, against=options.against))
    else:
        show_overview(found)


def _sources(options: RequestOptions) -> dict[Path, DataSet]:
    """Read each data file once, before the model is loaded; a corpus is read when it is searched."""
    from chunkcache.eval.data import DataSet

    stems = [data.stem for data in options.data]
    for stem in stems:
        if stems.count(stem) > 1:
            raise DocumentError(f"two data files are called {stem!r}; results go by that name, so rename one")
    return {} if options.questions is not None else {data: DataSet.read(data) for data in options.data}


def _prompts(
    options: RequestOptions,
    lengths: Sequence[int],
    sources: Mapping[Path, DataSet],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[tuple[str, list[Case], Sequence[str], dict[str, Any]]]:
    """Yield name, prompts, all chunks that there are, and settings: of each file, and number of chunks or lengths."""
    from chunkcache.eval.data import prompts_of_lengths
    from chunkcache.retriever import load_documents

    for data in options.data:
        settings = options.about(data)
        if lengths:
            cases = read_cases(sources[data], 0, 100, options.skip, quiet=True)
            cases = prompts_of_lengths(cases, lengths, options.prompts, tokenizer)
            pool = [chunk for case in cases for chunk in case.chunks]
            yield f"{data.stem}-lengths", cases, pool, {**settings, "chunks": None, "tokens": list(lengths)}
            continue
        if options.questions is not None:
            retriever = indexed(load_documents(data), tokenizer, options.chunk_tokens or 512)
            questions = draw_questions(options.questions, options.skip + options.prompts, 0)[options.skip :]
        for chunks in options.counts:
            if options.questions is not None:
                cases = retrieved_cases(retriever, questions, chunks)
                pool = [chunk.text for chunk in retriever.chunks]
            else:
                cases, pool = _cases(sources[data], chunks, options, tokenizer)
            yield f"{data.stem}-{chunks}", cases, pool, {**settings, "chunks": chunks, "tokens": None}


def _cases(
    source: DataSet, chunks: int, options: RequestOptions, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Case], list[str]]:
    """Return the prompts of a data set with so many chunks each, and all chunks that there are."""
    if options.least_tokens is None:
        cases = read_cases(source, chunks, options.prompts, options.skip, options.fill)
        return cut_with_all(source, cases, options.chunk_tokens, tokenizer)
    from chunkcache.eval.data import tokens_in

    cases = read_cases(source, chunks, len(source.cases), 0, options.fill, quiet=True)
    cases, pool = cut_with_all(source, cases, options.chunk_tokens, tokenizer)
    long = [case for case in cases if tokens_in(case, tokenizer) >= options.least_tokens]
    if len(long) < options.skip + options.prompts:
        raise DocumentError(
            f"{source.path} has {len(long)} prompts of {options.least_tokens} tokens or more, and --skip "
            f"{options.skip} --prompts {options.prompts} want {options.skip + options.prompts}"
        )
    return long[options.skip : options.skip + options.prompts], pool


@contextmanager
def started_peers(
    options: PeerOptions, model_name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[Peer]]:
    """Start the peers that are asked for, or all that are set up; one that cannot serve the model is left out."""
    if options.folder is None:
        yield []
        return
    import torch

    from chunkcache.eval.peers import PEERS, Peer, peer_weights

    folder = options.folder.absolute()
    if model.device.type != "cpu":
        raise PeerError(f"peers run on the CPU, and the model is on {model.device}: pass --device cpu with --peers")
    with ExitStack() as running:
        peers = []
        for name in options.peer_names or PEERS:
            try:
                with status(f"starting {name}"):
                    weights = peer_weights(name, folder, model_name, model, tokenizer)
                    peer = Peer.start(name, folder, weights, torch.get_num_threads())
            except PeerError as error:
                err.print(f"[yellow]without {name}:[/] {escape(str(error))}")
            else:
                peers.append(running.enter_context(peer))
        yield peers


@contextmanager
def started_builds(
    checkouts: Sequence[Path], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[Build]]:
    """Start other builds of chunkcache, which load the model from a folder that is gone afterwards."""
    if not checkouts:
        yield []
        return
    import torch

    from chunkcache.eval.peers import Build, model_folder

    if model.device.type != "cpu":
        raise PeerError(f"other builds run on the CPU, and the model is on {model.device}: pass --device cpu")
    with TemporaryDirectory() as made, ExitStack() as running:
        with status("starting other builds"):
            folder = model_folder(Path(made), model, tokenizer)
            threads = torch.get_num_threads()
            builds = [running.enter_context(Build.start(each, folder, threads)) for each in checkouts]
        yield builds


@dataclass(frozen=True, kw_only=True)
class HeatmapOptions:
    """One prompt under several policies."""

    data: Annotated[Path | None, argument()] = None
    chunks: Annotated[int, count("Chunks of the prompt.")] = 4
    prompt: Annotated[int, count("Which prompt of DATA.", least=0)] = 0
    policies: Policies = COMPARED
    model: ModelOptions
    output: OutputOptions


@command("heatmap")
def bench_heatmap(options: HeatmapOptions) -> None:
    """Note which tokens of a prompt each policy recomputes: one of DATA, or one over the example documents."""
    from chunkcache.eval.heatmap import heatmap
    from chunkcache.eval.report import build_report

    settings: dict[str, Any] = {"data": None, "chunks": options.chunks}
    if options.data is None:
        case = _example(options.chunks)
    else:
        case = read_cases(options.data, options.chunks, 1, options.prompt)[0]
        settings = {**about(options.data), "prompt": options.prompt, "chunks": options.chunks}
    model, tokenizer = options.model.load()
    with status("prefilling"):
        names = list(dict.fromkeys(options.policies))
        results = heatmap(model, tokenizer, case, names, settings, options.output.path("heatmap"))
    if options.output.as_json:
        show_json(build_report({"heatmap": results}))
        return
    rows = []
    for policy in results.settings["policies"]:
        shares = [row["share"] for row in results.rows if row["policy"] == policy and row["role"].startswith("chunk")]
        touched = sum(share > 0 for share in shares)
        rows.append([policy, str(len(shares)), str(touched), f"{sum(shares) / len(shares):.1%}"])
    wide(table("tokens of the chunks", ["policy", "tokens", "recomputed", "share of token-layers"], rows))


def _example(chunks: int) -> Case:
    """Return the first packaged question, over pieces of the document that answers it and of others."""
    from chunkcache.eval import Case
    from chunkcache.retriever import load_documents

    first = json.loads((EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    documents = load_documents(EXAMPLES / "corpus")
    best = sorted(documents, key=lambda document: -sum(a.lower() in document.text.lower() for a in first["answers"]))
    return Case(first["question"], tuple(document.text[:1000] for document in best[:chunks]), tuple(first["answers"]))
