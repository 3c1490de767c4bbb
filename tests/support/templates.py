# ruff: noqa: E501 - a template is a line
"""Shapes of chat templates as they are in use, written anew: what a prompt has to read like."""

from __future__ import annotations

_GEN = "{% if add_generation_prompt %}"
_SYSTEM = "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
_REST = "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
_NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
_ANSWER = "{% set a = m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content %}"

TEMPLATES: dict[str, str] = {
    "a header and an end for each": (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
        + _GEN
        + "<s>assistant\n{% endif %}"
    ),
    "the same, trimmed": (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content | trim }}</s>\n{% endfor %}"
        + _GEN
        + "<s>assistant\n{% endif %}"
    ),
    "a system prompt of its own where none is given": (
        "{% if messages[0].role != 'system' %}<s>system\nYou are kind.</s>\n{% endif %}"
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
        + _GEN
        + "<s>assistant\n{% endif %}"
    ),
    "brackets, system in the first turn": (
        _SYSTEM
        + _REST
        + "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] {% if loop.first and s %}<<SYS>>\n{{ s }}\n"
        "<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
    ),
    "brackets, system in the last turn": (
        _SYSTEM
        + _REST
        + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}[INST] {% if loop.last and s %}{{ s }}\n\n{% endif %}"
        "{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    "brackets without spaces": (
        _REST
        + _SYSTEM
        + "{{ bos_token }}{% if s %}[SYSTEM_PROMPT]{{ s }}[/SYSTEM_PROMPT]{% endif %}{% for m in rest %}"
        "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    "headers, a date, trimmed": (
        "{{ bos_token }}{% for m in messages %}<h>{{ m.role }}</h>\n\n{% if loop.first and m.role == 'system' %}"
        "Today: {{ strftime_now('%d %b %Y') }}\n\n{% endif %}{{ m.content | trim }}<e>{% endfor %}"
        + _GEN
        + "<h>assistant</h>\n\n{% endif %}"
    ),
    "turns, no system role": (
        _NO_SYSTEM
        + "{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}</turn>\n{% endfor %}" + _GEN + "<turn>model\n{% endif %}"
    ),
    "turns in strict order": (
        _NO_SYSTEM + "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('user and assistant in turn') }}{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        + _GEN
        + "<assistant>{% endif %}"
    ),
    "tags with an end token": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        + _GEN
        + "<|assistant|>\n{% endif %}"
    ),
    "tags, eos behind answers": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        + _GEN
        + "<|assistant|>{% endif %}"
    ),
    "thoughts opened for the answer, dropped from history": (
        _SYSTEM
        + _REST
        + "{{ bos_token }}{{ s }}{% for m in rest %}{% if m.role == 'user' %}<User>{{ m.content }}{% else %}"
        + _ANSWER
        + "<Assistant>{{ a }}</s>{% endif %}{% endfor %}"
        + _GEN
        + "<Assistant><think>\n{% endif %}"
    ),
    "thoughts that can be switched off": (
        "{% for m in messages %}" + _ANSWER + "<s>{{ m.role }}\n{{ a }}</s>\n{% endfor %}" + _GEN + "<s>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "a mode in the system prompt": (
        _SYSTEM
        + _REST
        + "<s>system\n## Metadata\nReasoning: {{ '/no_think' if enable_thinking is defined and not enable_thinking else "
        "'/think' }}\n\n{% if s %}## Instructions\n{{ s }}{% endif %}</s>\n{% for m in rest %}<s>{{ m.role }}\n"
        "{{ m.content }}</s>\n{% endfor %}" + _GEN + "<s>assistant\n{% endif %}"
    ),
    "words, one below the other": (
        _SYSTEM + _REST + "{{ s or 'A chat between a user and an assistant.' }}\n\n{% for m in rest %}"
        "{{ 'USER' if m.role == 'user' else 'ASSISTANT' }}: {{ m.content }}"
        "{{ '</s>' if m.role == 'assistant' else '\n' }}{% endfor %}" + _GEN + "ASSISTANT:{% endif %}"
    ),
    "headings": (
        _SYSTEM + _REST + "{% if s %}{{ s }}\n\n{% endif %}{% for m in rest %}### "
        "{{ 'Instruction' if m.role == 'user' else 'Response' }}:\n{{ m.content }}\n\n{% endfor %}"
        + _GEN
        + "### Response:\n{% endif %}"
    ),
    "turn tokens round everything": (
        "{{ bos_token }}{% for m in messages %}<START>{% if m.role == 'system' %}<SYS>{% elif m.role == 'user' %}<USER>"
        "{% else %}<BOT>{% endif %}{{ m.content | trim }}<END>{% endfor %}" + _GEN + "<START><BOT>{% endif %}"
    ),
    "documents in a turn of their own": (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}{% if documents %}<s>documents\n"
        "{% for d in documents %}{{ d.title }}: {{ d.text }}\n{% endfor %}</s>\n{% endif %}"
        + _GEN
        + "<s>assistant\n{% endif %}"
    ),
    "eos first": (
        "{{ eos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
        + _GEN
        + "<|assistant|>\n{% endif %}"
    ),
    "namespace and counters": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.n = ns.n + 1 %}[Round "
        "{{ ns.n }}]\n\nQ: {{ m.content }}\n\nA: {% elif m.role == 'assistant' %}{{ m.content }}\n\n{% else %}"
        "{{ m.content }}\n\n{% endif %}{% endfor %}"
    ),
    "text right before and behind": (
        "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}" + _GEN + "assistant={% endif %}"
    ),
    "a tail behind the last user turn": (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}{% if loop.last and m.role == 'user' %}\n(Answer in one "
        "sentence.){% endif %}</s>\n{% endfor %}" + _GEN + "<s>assistant\n{% endif %}"
    ),
    "macros": (
        "{% macro turn(role, text) %}<s>{{ role }}\n{{ text }}</s>\n{% endmacro %}"
        "{% for m in messages %}{{ turn(m.role, m.content) }}{% endfor %}" + _GEN + "<s>assistant\n{% endif %}"
    ),
}
