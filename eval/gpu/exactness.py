"""Whether every policy, store and family gives on this device what it gives on the CPU, in float32."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import chunkcache
from chunkcache.blend import POLICIES
from chunkcache.blend.triton import VARIABLE
from chunkcache.eval.gpu.check import Check, described, relative_error
from chunkcache.eval.gpu.made import VOCAB, load_zoo, make_model, make_texts

LIMIT = 1e-3  # relative error of logits in float32, TF32 off
QUANTISED_LIMIT = 2e-2  # a code at a border may be rounded up on one device and down on the other
STD = 0.12  # attention matters: a wrong mask, position or key shows in the logits
TABLE = "Exactness against the CPU, float32"
OPTIONS = {
    "link": ("link:k=4",),
    "cacheblend": ("cacheblend:ratio=0.2", "cacheblend:ratio=0.2,gradual=0.3,0.1"),
    "query": ("query:ratio=0.1", "query:ratio=0.1,k=2"),
}
EVERY_POLICY = [text for name in POLICIES for text in OPTIONS.get(name, (name,))]
FEW_POLICIES = ("link:k=4", "query:ratio=0.1")
STORES = (
    "device://",
    "device://?codec=int8",
    "memory://?codec=int4",
    "disk://{folder}",
    "tiered:device://|memory://",
)
SMOKE_FAMILIES = ("qwen2/sdpa", "gemma3/sdpa", "phi/eager")
Build = Callable[[], Any]
Outcome = tuple[Tensor, list[int]]


def exactness(check: Check) -> None:
    """Compare policies, stores, families, and the ways to ask."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        compare(check, "toy Llama", toy, EVERY_POLICY)
        _ways(check)
        for store in STORES:
            if check.has(5, f"exactness of {store}"):
                compare(check, "toy Llama", toy, FEW_POLICIES, store)
        _families(check)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def toy() -> Any:
    """Return a model in which attention matters, on the CPU."""
    return make_model("toy", torch.float32, std=STD)


def outcomes(check: Check, model: Any, policies: Sequence[str], store: str) -> dict[str, Outcome]:
    """Return logits and answer of one prompt under each policy: its chunks moved, two of them seen in another."""
    texts, question = make_texts(4, 1, 60), check.question(0)
    llm = chunkcache.wrap(model, check.tokenizer, store=store)
    found = {}
    try:
        for policy in policies:
            llm.store.clear()
            llm.precompute(texts, policy=policy)
            llm.prefill(question, texts[:2], policy=policy)
            logits = llm.prefill(question, texts[::-1], policy=policy).logits
            answer = llm.generate(question, texts[::-1], policy=policy, max_new_tokens=4)
            found[policy] = logits, answer.token_ids
    finally:
        llm.close()
    return found


@contextmanager
def using(kernels: str) -> Iterator[None]:
    """Ask for these kernels in the block, `torch` or `triton`."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = kernels
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def compare(
    check: Check,
    name: str,
    build: Build,
    policies: Sequence[str],
    store: str = "memory://",
    kernels: str = "torch",
) -> None:
    """Compare logits and answers under some policies, with KV in a store, with those of torch on the CPU."""
    quantised = "codec=" in store
    limit = QUANTISED_LIMIT if quantised else LIMIT
    with tempfile.TemporaryDirectory() as folder:
        ours = store.format(folder=folder)
        if not check.cuda:
            ours = ours.replace("device://?", "device://?device=cpu&").replace("device://|", "device://?device=cpu|")
            ours = "device://?device=cpu" if ours == "device://" else ours
        reference = "memory://" + (store[store.index("?") :] if quantised else "")
        try:
            with using("torch"):
                wanted = outcomes(check, build(), policies, reference)
            with using(kernels):
                got = outcomes(check, build().to(check.device), policies, ours)
        except Exception as error:  # noqa: BLE001 - the next comparison may run
            check.report.add_wrong(f"{name} over {store}: {described(error)}")
            return
    for policy in policies:
        off = relative_error(got[policy][0], wanted[policy][0])
        same = got[policy][1] == wanted[policy][1]
        label = "" if store == "memory://" else f" over {store}"
        check.report.row(TABLE, model=name, policy=f"{policy}{label}", error=off, answer="same" if same else "other")
        if not off < limit or not (same or quantised):
            check.report.add_wrong(f"{name}, {policy}{label}: relative error {off:.2g}, limit {limit:.2g}")


def _families(check: Check) -> None:
    """Compare each family of the tests' models."""
    zoo = load_zoo()
    if zoo is None:
        check.report.add_problem("families: tests/zoo.py is not there; run it from a checkout")
        return
    for name, attention in zoo.SERVED:
        label = f"{name}/{attention}"
        if check.options.smoke and label not in SMOKE_FAMILIES:
            continue
        if name == "phi3-longrope" or not check.has(3, f"exactness of {label}"):  # that one takes short prompts only
            continue
        compare(check, label, _of_family(zoo, name, attention), FEW_POLICIES)


def _of_family(zoo: Any, name: str, attention: str) -> Build:
    return lambda: zoo.new(name, attention, torch.float32, VOCAB, max_position_embeddings=4096)


def _ways(check: Check) -> None:
    """Compare a batch, a stream, an attached model and handed-over inputs with `generate`."""
    texts = make_texts(4, 1, 60)
    llm = chunkcache.wrap(toy().to(check.device), check.tokenizer, policy="link:k=4")
    questions = [check.question(number) for number in range(3)]
    try:
        llm.precompute(texts)
        alone = [llm.generate(question, texts, max_new_tokens=4).token_ids for question in questions]
        batch = llm.generate_batch([(question, texts) for question in questions], max_new_tokens=4)
        stream = llm.stream(questions[0], texts, max_new_tokens=4)
        list(stream)
        assert stream.result is not None
        inputs = llm.prepare_inputs(questions[0], texts)
        length = inputs["input_ids"].shape[1]
        greedy: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 3}
        handed = llm.model.generate(**inputs, **greedy)[0, length:].tolist()
        with llm.attached():
            attached = llm.model.generate(inputs["input_ids"], **greedy)[0, length:].tolist()
        same = {
            "batch": [answer.token_ids for answer in batch] == alone,
            "stream": stream.result.token_ids == alone[0],
            "prepare_inputs": handed == alone[0],
            "attached": attached == alone[0],
        }
        for way, agrees in same.items():
            check.report.row("Ways to ask, against generate", way=way, answer="same" if agrees else "other")
            if not agrees:
                check.report.add_wrong(f"{way} answers other than generate()")
    except Exception as error:  # noqa: BLE001 - the families are still to be compared
        check.report.add_wrong(f"ways to ask: {described(error)}")
    finally:
        llm.close()
