"""Options of the chat template, templates by name and set later, and templates that decide by what a text says."""

from __future__ import annotations

import pytest
from support.llm import QUESTION, TEXTS
from support.prompts import HOSTILE, body, marking, rendered, tokenizer_of
from support.templates import TEMPLATES

from chunkcache.errors import PromptError
from chunkcache.library.registry import ChunkRegistry
from chunkcache.prompt import PromptBuilder
from chunkcache.prompt.messages import MessageBuilder, PromptChunk

MODE = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}<s>system\nMode: "
    "{{ 'fast' if '/no_think' in s else 'slow' }}\n{{ s.replace('/no_think', '').rstrip() }}</s>\n"
    "{% for m in messages if m.role != 'system' %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def test_options_reach_the_template():
    tokenizer = tokenizer_of("byte level", TEMPLATES["thoughts that can be switched off"])
    messages = [{"role": "user", "content": QUESTION}]
    build = MessageBuilder(PromptBuilder(tokenizer), ChunkRegistry()).build
    assert list(build(messages).token_ids) == rendered(tokenizer, messages)[1]
    off = build(messages, {"enable_thinking": False})
    assert list(off.token_ids) == rendered(tokenizer, messages, enable_thinking=False)[1]
    wrapped = PromptBuilder(tokenizer, template_options={"enable_thinking": False})
    assert wrapped.build(QUESTION, []).token_ids[-3:] == off.token_ids[-3:]
    assert wrapped.with_options({"enable_thinking": True}).build(QUESTION, []) == PromptBuilder(tokenizer).build(
        QUESTION, []
    )


def test_documents_reach_the_template():
    tokenizer = tokenizer_of("byte level", TEMPLATES["documents in a turn of their own"])
    documents = [{"title": "Ferry", "text": "It sails twice."}]
    prompt = PromptBuilder(tokenizer, template_options={"documents": documents}).build(QUESTION, TEXTS)
    assert "Ferry: It sails twice." in tokenizer.decode(prompt.token_ids)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"enable_thinkin": False}, r"does not read 'enable_thinkin'; it reads .*enable_thinking"),
        ({"tools": [{"type": "function"}]}, "does not read 'tools'"),
        ("enable_thinking", "template_options is a str; pass a mapping"),
        ({"add_generation_prompt": False}, "'add_generation_prompt' is chunkcache's own"),
    ],
)
def test_an_option_that_cannot_be_served_is_named(options, says):
    tokenizer = tokenizer_of("byte level", TEMPLATES["thoughts that can be switched off"])
    with pytest.raises(PromptError, match=says):
        PromptBuilder(tokenizer, template_options=options)


@pytest.mark.parametrize("chunks", [(), TEXTS])
def test_a_template_may_decide_by_what_a_text_says(chunks):
    """Here a word in the system prompt switches what stands before it, and is left out."""
    tokenizer = tokenizer_of("byte level", MODE)
    for system in ("Be brief.", "Be brief. /no_think", f"{HOSTILE} /no_think"):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": body(QUESTION, chunks)}]
        prompt = PromptBuilder(tokenizer).build(QUESTION, chunks, system)
        assert tokenizer.decode(prompt.token_ids) == rendered(tokenizer, messages)[0]
        special = [tokenizer.convert_ids_to_tokens(each) for each in prompt.token_ids if each in marking(tokenizer)]
        assert special == ["<s>", "</s>", "<s>", "</s>", "<s>"]
        assert PromptBuilder(tokenizer).prefix(system) == prompt.prefix
        asked = {"role": "user", "content": [*map(PromptChunk, chunks), QUESTION]} if chunks else messages[1]
        chat = MessageBuilder(PromptBuilder(tokenizer), ChunkRegistry()).build([messages[0], asked])
        assert chat.token_ids == prompt.token_ids


REWRITES = {
    "drops thoughts": "{{ m.content.split('</think>')[-1].lstrip('\\n') }}",
    "trims answers": "{{ m.content | trim if m.role == 'assistant' else m.content }}",
    "trims questions": "{{ m.content | trim if m.role == 'user' else m.content }}",
    "keeps the first line": "{{ m.content.split('\\n')[0] if m.role == 'assistant' else m.content }}",
    "drops notes": "{{ m.content.replace('(note)', '') }}",
}


@pytest.mark.parametrize("mode", [False, True], ids=["", "and has a mode"])
@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_a_template_may_rewrite_what_was_said(rewrite, mode):
    start = "{{ 'fast' if '/no_think' in messages[0].content else 'slow' }}" if mode else ""
    turns = f"{{% for m in messages %}}<s>{{{{ m.role }}}}\n{rewrite}</s>\n{{% endfor %}}"
    tokenizer = tokenizer_of("byte level", start + turns)
    said = ["Hm.\n</think>\n\nYes. \nIt is.\n", " (note) Why? ", "<think>\nHm.</think>\nNo", "When?</s>"]
    roles = ["user", "assistant", "user", "assistant", "user"]
    contents = ["Be brief. /no_think ", *said]
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
    ids = MessageBuilder(PromptBuilder(tokenizer), ChunkRegistry()).build(messages).token_ids
    assert tokenizer.decode(ids) == rendered(tokenizer, messages)[0]
    assert [each for each in ids if each in marking(tokenizer)] == [1, 2] * 5


def test_a_template_whose_own_text_cannot_be_told_is_refused():
    by_length = "{% for m in messages %}{{ m.content | length }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(PromptError, match="cannot be told from its own text"):
        PromptBuilder(tokenizer_of("byte level", by_length)).build(QUESTION, TEXTS, "Be brief.")


@pytest.mark.parametrize("as_json", [False, True])
def test_documents_of_the_template_are_no_special_tokens(as_json):
    written = "{{ documents | tojson }}" if as_json else "{% for d in documents %}{{ d.text | trim }}{% endfor %}"
    tokenizer = tokenizer_of("byte level", f"{written}{TEMPLATES['a header and an end for each']}")

    def special(text: str) -> int:
        options = {"documents": [{"text": text}]}
        prompt = PromptBuilder(tokenizer, template_options=options).build(QUESTION, TEXTS)
        said = text.replace("\n", "\\n") if as_json else text
        assert said in tokenizer.decode(prompt.token_ids)
        return sum(each in marking(tokenizer) for each in prompt.token_ids)

    assert special(HOSTILE) == special("Ferry.")


def test_an_option_may_be_a_special_token():
    tokenizer = tokenizer_of("byte level", "{{ start }}{% for m in messages %}{{ m.content }}{% endfor %}")
    prompt = PromptBuilder(tokenizer, template_options={"start": "<h>"}).build(QUESTION, TEXTS)
    assert prompt.token_ids[0] == tokenizer.convert_tokens_to_ids("<h>")


def test_tags_of_transformers_own_do_not_hide_what_a_template_reads():
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ mood }}{% endfor %}"
    tokenizer = tokenizer_of("byte level", template)
    prompt = PromptBuilder(tokenizer, template_options={"mood": "calm"}).build(QUESTION, TEXTS)
    assert tokenizer.decode(prompt.token_ids).endswith("calm")
    with pytest.raises(PromptError, match=r"does not read 'padding'; it reads mood"):
        PromptBuilder(tokenizer, template_options={"padding": True})


def test_a_template_that_fails_is_refused_without_the_text():
    tokenizer = tokenizer_of("byte level", "{% for m in messages %}{{ m.content | int(none) + 1 }}{% endfor %}")
    with pytest.raises(PromptError, match="TypeError") as caught:
        PromptBuilder(tokenizer).build(QUESTION, TEXTS)
    assert QUESTION not in str(caught.value)


def test_a_template_given_as_an_option():
    header = TEMPLATES["a header and an end for each"]
    expected = PromptBuilder(tokenizer_of("byte level", header)).build(QUESTION, TEXTS)
    bare = tokenizer_of("byte level", None)
    assert PromptBuilder(bare, template_options={"chat_template": header}).build(QUESTION, TEXTS) == expected
    with pytest.raises(PromptError, match="no chat template called 'rag'"):
        PromptBuilder(bare, template_options={"chat_template": "rag"})


def test_what_a_template_that_is_set_later_cannot_serve_is_named_then():
    tokenizer = tokenizer_of("byte level", TEMPLATES["thoughts that can be switched off"])
    plain, switched = PromptBuilder(tokenizer), PromptBuilder(tokenizer, template_options={"enable_thinking": False})
    tokenizer.chat_template = TEMPLATES["headings"]
    plain.build(QUESTION, TEXTS)
    with pytest.raises(PromptError, match="does not read 'enable_thinking'"):
        switched.build(QUESTION, TEXTS)
    tokenizer.chat_template = {"rag": TEMPLATES["headings"]}
    with pytest.raises(PromptError, match="none called 'default'"):
        plain.build(QUESTION, TEXTS)


def test_templates_by_name():
    header, words = TEMPLATES["a header and an end for each"], TEMPLATES["headings"]
    tokenizer = tokenizer_of("byte level", {"rag": header, "plain": words})
    with pytest.raises(PromptError, match=r"'rag', 'plain', and none called 'default'"):
        PromptBuilder(tokenizer)
    named = PromptBuilder(tokenizer, template_options={"chat_template": "rag"}).build(QUESTION, TEXTS)
    assert named == PromptBuilder(tokenizer_of("byte level", header)).build(QUESTION, TEXTS)
    default = tokenizer_of("byte level", {"default": words, "rag": header})
    assert PromptBuilder(default).build(QUESTION, []) == PromptBuilder(tokenizer_of("byte level", words)).build(
        QUESTION, []
    )


def test_a_template_that_is_set_later_is_used():
    tokenizer = tokenizer_of("byte level", "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    prompts = PromptBuilder(tokenizer)
    with pytest.raises(PromptError, match=r"set tokenizer\.chat_template"):
        prompts.build(QUESTION, TEXTS)
    for template in (TEMPLATES["headings"], None):
        tokenizer.chat_template = template
        assert prompts.build(QUESTION, TEXTS) == PromptBuilder(tokenizer_of("byte level", template)).build(
            QUESTION, TEXTS
        )
