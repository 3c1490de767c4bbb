"""A conversation goes on from its own KV: what was said is exact, and never computed again."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from support.llm import QUESTION, TEXTS, VOCAB, chat_tokenizer, plain, tiny_model, wrapped
from tokenizers import AddedToken

import chunkcache
from chunkcache import blend
from chunkcache.errors import ContextLengthError, InputError, PromptError
from chunkcache.prompt.builder import INSTRUCTION, SEPARATOR

MORE = ("The new bridge is of steel, and was opened by the mayor.", "Every second year it is painted green.")
THEN = "And of what is the new one?"
SPECIAL = [0, 1, 2, 3]
MOVED = (
    "{% for m in messages if m.role != 'system' %}<s>{{ m.role }}\n"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ m.content }}</s>\n{% endfor %}"
)
MODELS = ["llama", "gemma3", "mistral-sliding", "smollm3"]  # full and sliding windows, layers without RoPE


def body(question, chunks):
    return f"{INSTRUCTION}\n\n{''.join(f'{chunk}{SEPARATOR}' for chunk in chunks)}Question: {question}"


@pytest.mark.parametrize("name", MODELS)
def test_with_an_exact_policy_every_turn_is_what_the_model_says_itself(name):
    model = tiny_model(name)
    llm = wrapped(model, policy="cacheblend:ratio=1")
    conversation = llm.conversation()
    messages = []
    for question, chunks in ((QUESTION, TEXTS), (THEN, MORE), ("Why?", ()), (THEN, TEXTS[:1])):
        messages.append({"role": "user", "content": body(question, chunks)})
        ids = conversation.prefill(question, chunks).input_ids
        expected = llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert llm.tokenizer.decode(ids[0]) == expected
        answer = conversation.generate(question, chunks, max_new_tokens=6, do_sample=False, suppress_tokens=SPECIAL)
        assert answer.token_ids == plain(model, ids, max_new_tokens=6, suppress_tokens=SPECIAL)
        messages.append({"role": "assistant", "content": llm.tokenizer.decode(answer.token_ids)})
    assert conversation.turns == 4


def test_a_template_that_moves_the_system_prompt_has_what_changed_computed_anew():
    """It stands in the last user turn: what was said before is another text by then."""
    tokenizer = copy.deepcopy(chat_tokenizer())
    tokenizer.chat_template = MOVED
    model = tiny_model()
    llm = chunkcache.wrap(model, tokenizer, policy="full")
    conversation = llm.conversation("Be brief.")
    answer = conversation.generate(QUESTION, TEXTS, max_new_tokens=6, do_sample=False, suppress_tokens=SPECIAL)
    done = conversation.prefill(THEN, MORE)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": body(QUESTION, TEXTS)},
        {"role": "assistant", "content": tokenizer.decode(answer.token_ids)},
        {"role": "user", "content": body(THEN, MORE)},
    ]
    assert tokenizer.decode(done.input_ids[0]) == tokenizer.apply_chat_template(messages, tokenize=False)
    torch.testing.assert_close(done.logits, model(input_ids=done.input_ids).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_exact_reuse_goes_on_from_no_kv_that_were_repaired():
    llm = wrapped(policy="reuse")
    conversation = llm.conversation()
    conversation.generate(QUESTION, TEXTS, max_new_tokens=6, suppress_tokens=SPECIAL)
    done = conversation.prefill(THEN, MORE, policy="exact")
    own = tiny_model()(input_ids=done.input_ids).logits[0, -1]
    torch.testing.assert_close(done.logits, own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", [name for name in blend.POLICIES if name != "full"])
def test_what_was_said_is_not_computed_again(policy):
    llm = wrapped(policy=policy)
    conversation = llm.conversation()
    conversation.generate(QUESTION, TEXTS, max_new_tokens=6)
    said = len(conversation.token_ids)
    stats = conversation.prefill("Why?").stats
    assert stats.exact_tokens == said - 1  # the last token of an answer has no KV yet
    assert stats.recomputed_share == pytest.approx(1 - (said - 1) / stats.tokens)


@pytest.mark.parametrize("policy", ["reuse", "query:ratio=0.2", "cachecraft"])
def test_chunks_of_a_later_turn_are_reused_where_they_now_stand(policy):
    llm = wrapped(policy=policy)
    llm.precompute((*TEXTS, *MORE))
    conversation = llm.conversation()
    conversation.generate(QUESTION, TEXTS, max_new_tokens=6)
    stats = conversation.generate(THEN, MORE, max_new_tokens=6).stats
    assert (stats.hits, stats.misses) == (2, 0)
    assert stats.reused_tokens - stats.exact_tokens == sum(len(llm.prompts.chunk(text)) for text in MORE)
    assert stats.recomputed_share < 0.5


def test_the_kv_of_earlier_turns_stay_what_they_were():
    llm = wrapped(policy="query:ratio=0.2")
    conversation = llm.conversation()
    conversation.generate(QUESTION, TEXTS, max_new_tokens=6)
    before = [layer.clone() for layer in conversation._head.layers]
    conversation.generate(THEN, MORE, max_new_tokens=6)
    for layer, was in zip(conversation._head.layers, before, strict=True):
        assert torch.equal(layer[:, :, : was.shape[2]], was)


def test_prefill_leaves_the_conversation_where_it_is():
    conversation = wrapped().conversation()
    conversation.generate(QUESTION, TEXTS, max_new_tokens=4)
    before = conversation.token_ids
    first, second = (conversation.prefill(THEN, MORE).logits for _ in range(2))
    torch.testing.assert_close(first, second)
    assert (conversation.token_ids, conversation.turns) == (before, 1)


def test_a_turn_that_fails_leaves_it_where_it_is():
    conversation = wrapped().conversation()
    conversation.generate(QUESTION, TEXTS, max_new_tokens=4)
    before = conversation.token_ids
    for call, error in (
        (lambda: conversation.generate("", MORE), PromptError),
        (lambda: conversation.generate(THEN, MORE, num_beams=2), InputError),
        (lambda: conversation.generate(THEN, TEXTS * 9), ContextLengthError),
    ):
        with pytest.raises(error):
            call()
    assert (conversation.token_ids, conversation.turns) == (before, 1)
    conversation.generate(THEN, MORE, max_new_tokens=4)


def test_a_streamed_turn_counts_once_it_is_over():
    streamed, plainly = wrapped().conversation(), wrapped().conversation()
    for question, chunks in ((QUESTION, TEXTS), (THEN, MORE)):
        stream = streamed.stream(question, chunks, max_new_tokens=6)
        pieces = "".join(stream)
        answer = plainly.generate(question, chunks, max_new_tokens=6)
        assert pieces.strip() == answer.text == stream.result.text
    assert streamed.token_ids == plainly.token_ids
    assert streamed.turns == 2


def test_two_conversations_do_not_meet():
    llm = wrapped()
    one, other = llm.conversation(), llm.conversation(system="Be brief.")
    one.generate(QUESTION, TEXTS, max_new_tokens=4)
    other.generate(QUESTION, TEXTS, max_new_tokens=4)
    assert one.token_ids != other.token_ids
    alone = wrapped().conversation()
    alone.generate(QUESTION, TEXTS, max_new_tokens=4)
    assert (
        alone.generate(THEN, MORE, max_new_tokens=6).token_ids == one.generate(THEN, MORE, max_new_tokens=6).token_ids
    )


def test_an_end_of_turn_that_the_model_said_is_not_said_twice():
    llm = wrapped()
    conversation = llm.conversation()
    ended = conversation.generate(QUESTION, TEXTS, max_new_tokens=4, forced_eos_token_id=2).token_ids
    assert ended[-1] == 2
    second = conversation.prefill(THEN, MORE).input_ids[0].tolist()
    said = list(conversation.token_ids)
    assert second[: len(said)] == said
    assert second[len(said)] != 2


def test_without_a_chat_template():
    tokenizer = copy.deepcopy(chat_tokenizer())
    tokenizer.chat_template = None
    conversation = chunkcache.wrap(tiny_model(), tokenizer).conversation()
    conversation.generate(QUESTION, TEXTS, max_new_tokens=4)
    said = conversation.token_ids
    conversation.generate(THEN, MORE, max_new_tokens=4)
    assert conversation.token_ids[: len(said)] == said


def test_a_template_for_one_turn_only_is_refused_by_the_second():
    tokenizer = copy.deepcopy(chat_tokenizer())
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    conversation = chunkcache.wrap(tiny_model(), tokenizer).conversation()
    conversation.generate(QUESTION, TEXTS, max_new_tokens=4)
    with pytest.raises(PromptError, match="does not keep these messages apart"):
        conversation.generate(THEN, MORE)


def test_an_end_of_turn_that_only_the_model_names_is_not_said_twice():
    """Such as `<|end|>`: no EOS of the tokenizer, but among those of the generation config."""
    tokenizer = copy.deepcopy(chat_tokenizer())
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    model = zoo.new("llama", vocab_size=VOCAB + 8)
    model.generation_config.eos_token_id = [2, end]
    conversation = chunkcache.wrap(model, tokenizer).conversation()
    plainly = {"do_sample": False, "suppress_tokens": SPECIAL, "min_new_tokens": 3}
    said = conversation.generate(QUESTION, TEXTS, max_new_tokens=4, forced_eos_token_id=end, **plainly)
    assert said.token_ids[-1] == end
    second = conversation.prefill(THEN, MORE)
    ids = second.input_ids[0].tolist()
    assert ids[: len(conversation.token_ids)] == list(conversation.token_ids)
    assert ids[len(conversation.token_ids)] != end
    assert second.stats.exact_tokens >= len(conversation.token_ids) - 1


def test_template_options_of_a_conversation_and_of_a_turn():
    tokenizer = copy.deepcopy(chat_tokenizer())
    tokenizer.chat_template += "{{ mood }}"
    conversation = chunkcache.wrap(tiny_model(), tokenizer).conversation(template_options={"mood": "calm"})

    def end(**options):
        return tokenizer.decode(conversation.prefill(QUESTION, TEXTS, **options).input_ids[0]).rpartition("\n")[2]

    assert end() == "calm"
    assert end(template_options={"mood": "gay"}) == "gay"
    with pytest.raises(PromptError, match="does not read 'mod'"):
        chunkcache.wrap(tiny_model(), tokenizer).conversation(template_options={"mod": "calm"})
