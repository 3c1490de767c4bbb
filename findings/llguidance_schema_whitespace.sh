#!/usr/bin/env bash
# llguidance 1.9.1: two ways to make a grammar of one JSON schema differ in whether white space may stand between tokens.
#
# Seen: `LLMatcher.grammar_from_json_schema(schema)` allows any run of white space, so a small model under greedy decoding can
# write nothing but that until its length is used up; `JsonCompiler().compile(schema)` of the same package allows none, and so
# does the first one with `defaults={"whitespace_flexible": False}`.
# Whoever lets a small model answer by a schema sets it, and does not take the grammars of the two for the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llguidance==1.9.1
"$folder/venv/bin/python" - <<'PYTHON'
import json

import llguidance

tokenizer = llguidance.LLTokenizer("byte")
schema = json.dumps(
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
)


def newlines(grammar):
    """Return how many of 2,000 line breaks are taken behind the opening brace."""
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    assert matcher.consume_tokens(tokenizer.tokenize_str("{"))
    line_break = tokenizer.tokenize_str("\n")
    return sum(matcher.try_consume_tokens(line_break) for _ in range(2000))


by_matcher = newlines(llguidance.LLMatcher.grammar_from_json_schema(schema))
compact = newlines(llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False}))
by_compiler = newlines(llguidance.JsonCompiler().compile(schema))
print(llguidance.get_version())
print(f"grammar_from_json_schema: {by_matcher}; with whitespace_flexible False: {compact}; JsonCompiler: {by_compiler}")
assert "llguidance@1.9.1" in llguidance.get_version()
assert by_matcher == 2000, "grammar_from_json_schema no longer allows any white space"
assert compact == by_compiler == 0, "the compact grammars allow white space now"
print("seen")
PYTHON
