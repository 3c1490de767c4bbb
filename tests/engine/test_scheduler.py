"""Requests that are answered together get the answers that they get alone, whenever they come and whoever leaves."""

from __future__ import annotations

import threading
from queue import Queue

import pytest
from support.llm import QUESTION, TEXTS, own_model, tiny_model, wrapped

from chunkcache.engine.detokenizer import Detokenizer
from chunkcache.engine.fair import FairQueue
from chunkcache.engine.sampling import Sampled, Sampler
from chunkcache.engine.scheduler import Limits, Scheduler
from chunkcache.engine.ticket import Failed, Finished
from chunkcache.errors import ContextLengthError, InputError, QueueFullError

QUESTIONS = (QUESTION, "Who wrote the weather down?", "When does the ferry sail?", "What is yesterday's?")
REQUESTS = [(question, TEXTS[first:]) for question in QUESTIONS for first in (0, 1, 2)]


class Asked:
    """A request and what came of it."""

    def __init__(self, llm, scheduler, question, chunks, policy=None, tenant="", timeout=None, **options):
        sampling = {name: options.pop(name) for name in ("seed",) if name in options}
        build = lambda: llm.prompts.build(question, chunks)  # noqa: E731
        request = llm.engine.prepare(build, policy, options.pop("max_new_tokens", 10), options)
        sampler = Sampler(llm.model, {**request.options, **sampling}, request.prompt.token_ids)
        self.events = Queue()
        self.ticket = scheduler.submit(request, sampler, self.events.put, tenant=tenant, timeout=timeout)

    def wait(self):
        """Return the token ids and the end."""
        ids = []
        while isinstance(event := self.events.get(timeout=60), Sampled):
            ids.append(event.token_id)
        return ids, event


@pytest.fixture
def llm():
    return wrapped()


@pytest.fixture
def scheduler(llm):
    scheduler = Scheduler(llm.engine)
    yield scheduler
    scheduler.close()


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-sliding", "smollm3"])
@pytest.mark.parametrize("policy", ["full", "query:ratio=0.1", "link:k=2", "query:ratio=0,later=0.4"])
def test_all_get_the_answers_that_they_get_alone(name, policy):
    llm = wrapped(tiny_model(name), policy=policy)
    llm.precompute(TEXTS)
    scheduler = Scheduler(llm.engine, Limits(running=5))
    asked = [Asked(llm, scheduler, *request, max_new_tokens=4 + at) for at, request in enumerate(REQUESTS)]
    for at, (request, each) in enumerate(zip(REQUESTS, asked, strict=True)):
        ids, end = each.wait()
        assert ids == llm.generate(*request, max_new_tokens=4 + at, do_sample=False).token_ids
        assert end.reason in ("stop", "length")
        assert end.stats.hits == (0 if policy == "full" else len(request[1]))
    scheduler.close()
    assert scheduler.load == (0, 0)


def test_sequences_decode_together(llm, scheduler):
    asked = [Asked(llm, scheduler, *request, max_new_tokens=40) for request in REQUESTS[:4]]
    produced = sum(len(each.wait()[0]) for each in asked)
    assert scheduler.steps < produced - len(asked)


def test_options_of_generate_count(llm, scheduler):
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "max_new_tokens": 20}
    ids, _ = Asked(llm, scheduler, QUESTION, TEXTS, **options).wait()
    assert ids == llm.generate(QUESTION, TEXTS, **options).token_ids
    assert ids != llm.generate(QUESTION, TEXTS, max_new_tokens=20).token_ids


def test_a_seed_makes_samples_repeatable(llm, scheduler):
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 12}
    first, second, other = (
        Asked(llm, scheduler, QUESTION, TEXTS, seed=seed, **options).wait()[0] for seed in (1, 1, 2)
    )
    assert first == second != other


def test_a_cancelled_request_ends_and_the_others_go_on(llm, scheduler):
    leaving = Asked(llm, scheduler, QUESTION, TEXTS, max_new_tokens=360, min_new_tokens=350)
    staying = Asked(llm, scheduler, *REQUESTS[4], max_new_tokens=20)
    leaving.events.get(timeout=60)
    leaving.ticket.cancel()
    ids, end = leaving.wait()
    assert end.reason == "cancelled"
    assert len(ids) < 349
    assert staying.wait()[0] == llm.generate(*REQUESTS[4], max_new_tokens=20).token_ids


def test_a_deadline_ends_a_request(llm, scheduler):
    assert Asked(llm, scheduler, QUESTION, TEXTS, timeout=0.0).wait()[1] == Finished("deadline", None)


def test_too_many_are_refused(llm):
    scheduler = Scheduler(llm.engine, Limits(running=1, waiting=1))
    running = Asked(llm, scheduler, QUESTION, TEXTS, max_new_tokens=360, min_new_tokens=350)
    running.events.get(timeout=60)  # it decodes, and holds the only place
    waiting = Asked(llm, scheduler, QUESTION, TEXTS)
    with pytest.raises(QueueFullError, match="1 requests wait already"):
        Asked(llm, scheduler, QUESTION, TEXTS)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    assert running.wait()[1].reason == waiting.wait()[1].reason == "cancelled"
    closing.join()
    with pytest.raises(QueueFullError, match="shutting down"):
        Asked(llm, scheduler, QUESTION, TEXTS)


def test_one_tenant_does_not_keep_the_others_out(llm):
    scheduler = Scheduler(llm.engine, Limits(running=1, waiting=2))
    running = Asked(llm, scheduler, QUESTION, TEXTS, tenant="a", max_new_tokens=360, min_new_tokens=350)
    running.events.get(timeout=60)
    taken, refused = [], []
    for tenant in ("a", "a", "a", "b", "b", "a", "c", "d"):  # `c` takes the last place that there is at all
        try:
            taken.append((tenant, Asked(llm, scheduler, QUESTION, TEXTS, tenant=tenant)))
        except QueueFullError:
            refused.append(tenant)
            with pytest.raises(QueueFullError):
                scheduler.check_room(tenant)
    assert [tenant for tenant, _ in taken] == ["a", "a", "b", "c"]
    assert refused == ["a", "b", "a", "d"]
    assert scheduler.waiting == {"a": 2, "b": 1, "c": 1}
    taken[0][1].ticket.cancel()
    scheduler.check_room("d")  # in the place of one that waits in vain
    scheduler.close()


def test_those_that_wait_in_vain_give_up_their_place(llm):
    scheduler = Scheduler(llm.engine, Limits(running=1, waiting=1))
    running = Asked(llm, scheduler, QUESTION, TEXTS, max_new_tokens=360, min_new_tokens=350)
    running.events.get(timeout=60)
    gone = Asked(llm, scheduler, QUESTION, TEXTS)
    gone.ticket.cancel()
    late = Asked(llm, scheduler, QUESTION, TEXTS, timeout=0.0)  # takes its place
    assert gone.wait()[1] == Finished("cancelled", None)
    assert late.wait()[1] == Finished("deadline", None)
    assert scheduler.load == (1, 0)  # the first runs on
    scheduler.close()


def test_one_who_cannot_be_told_holds_up_nobody(llm, scheduler):
    def broken(event):
        raise RuntimeError("the loop is closed")

    for tokens in (1, 20):
        request = llm.engine.prepare(lambda: llm.prompts.build(QUESTION, TEXTS), None, tokens, {})
        scheduler.submit(request, Sampler(llm.model, request.options, request.prompt.token_ids), broken)
    asked = [Asked(llm, scheduler, *REQUESTS[0]) for _ in range(2)]
    assert [each.wait()[0] for each in asked] == [llm.generate(*REQUESTS[0], max_new_tokens=10).token_ids] * 2


def test_those_that_run_may_end_when_it_closes(llm):
    scheduler = Scheduler(llm.engine)
    asked = [Asked(llm, scheduler, *request) for request in REQUESTS[:3]]
    scheduler.close(timeout=60)
    assert {each.wait()[1].reason for each in asked} <= {"stop", "length"}


def test_running_sequences_keep_within_their_memory(llm):
    per_token = llm.engine.decoder.kv_bytes_per_token
    tokens = len(llm.prompts.build(QUESTION, TEXTS).token_ids) + 10
    scheduler = Scheduler(llm.engine, Limits(kv_bytes=per_token * tokens))
    with pytest.raises(InputError, match="bytes of KV"):
        Asked(llm, scheduler, QUESTION, [*TEXTS, *TEXTS])
    asked = [Asked(llm, scheduler, QUESTION, TEXTS) for _ in range(3)]
    ids = [each.wait()[0] for each in asked]
    assert ids == ids[:1] * 3
    assert scheduler.steps == sum(map(len, ids)) - len(ids)  # no two fit at once
    scheduler.close()


def test_what_cannot_be_answered_is_refused(llm, scheduler):
    with pytest.raises(ContextLengthError, match="do not fit"):
        Asked(llm, scheduler, QUESTION, TEXTS, max_new_tokens=10_000)
    with pytest.raises(InputError, match="adapter"):
        Asked(llm, scheduler, QUESTION, TEXTS, adapter="legal")
    with pytest.raises(InputError, match="temperature"):
        Asked(llm, scheduler, QUESTION, TEXTS, do_sample=True, temperature=-1.0)


def test_a_request_that_fails_fails_alone(scheduler, llm):
    class Broken:
        ends = frozenset()

        def choose(self, logits):
            raise RuntimeError("no token")

    good = Asked(llm, scheduler, *REQUESTS[0], max_new_tokens=30)
    request = llm.engine.prepare(lambda: llm.prompts.build(QUESTION, TEXTS), None, 5, {})
    events = Queue()
    scheduler.submit(request, Broken(), events.put)
    failed = events.get(timeout=60)
    assert isinstance(failed, Failed)
    assert "no token" in str(failed.error)
    assert good.wait()[0] == llm.generate(*REQUESTS[0], max_new_tokens=30).token_ids


def test_a_model_that_changes_answers_those_that_began_before():
    model = own_model()
    llm = wrapped(model)
    scheduler = Scheduler(llm.engine)
    first = Asked(llm, scheduler, QUESTION, TEXTS, max_new_tokens=60)
    first.events.get(timeout=60)
    model.lm_head.weight.data = model.lm_head.weight.data * -1
    second = Asked(llm, scheduler, QUESTION, TEXTS)
    assert second.wait()[0] == llm.generate(QUESTION, TEXTS, max_new_tokens=10).token_ids
    assert first.wait()[1].reason in ("stop", "length")
    scheduler.close()


def test_tenants_take_turns():
    queue = FairQueue()
    for tenant, item in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)]:
        queue.put(tenant, item)
    assert queue.first() == 1
    assert len(queue) == 6
    assert queue.remove(lambda item: item > 6) == []
    assert [queue.get() for _ in range(4)] == [1, 4, 5, 2]
    queue.put("d", 7)
    assert queue.remove(lambda item: item in (6, 7)) == [6, 7]
    assert list(queue.drain()) == [3]
    with pytest.raises(IndexError):
        queue.get()


@pytest.mark.parametrize(
    "text", ["Ein Haus mit 3 Türen, naïve – 日本語 🙂 ok", "a  b\n\n c", "stop here and STOP there"]
)
@pytest.mark.parametrize("stop", [(), ("STOP",), ("ok", "here")])
def test_text_comes_in_pieces_and_ends_before_a_stop_string(text, stop):
    tokenizer = wrapped().tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids)
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.stopped:
            break
    pieces.append(detokenizer.finish())
    ends = [at for each in stop if (at := whole.find(each)) >= 0]
    assert "".join(pieces) == detokenizer.text == (whole[: min(ends)] if ends else whole)
    assert detokenizer.stopped == bool(ends)


def test_a_stop_string_is_found_behind_an_unfinished_character():
    detokenizer = Detokenizer(Written({1: "so", 2: "STOP\N{REPLACEMENT CHARACTER}"}), ("STOP",))
    assert [detokenizer.push(1), detokenizer.push(2)] == ["so", ""]
    assert detokenizer.finish() == ""
    assert detokenizer.stopped


def test_spaces_behind_a_special_token_are_kept():
    detokenizer = Detokenizer(Written({1: "\u2581The", 2: "", 3: "\u2581ferry"}))
    assert "".join(map(detokenizer.push, (1, 2, 3))) == "The ferry"


class Written:
    """Decodes as SentencePiece does: without the space that stands first."""

    def __init__(self, texts):
        self._texts = texts

    def decode(self, ids, **options):
        return "".join(self._texts[each] for each in ids).replace("\u2581", " ").removeprefix(" ")
