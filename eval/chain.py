"""The LangChain plug-in from end to end: time to the first token through a chain, with it and without.

One chain, of a retriever, a prompt template and a chat model, runs on each prompt over plain transformers, and over
the plug-in with all chunks precomputed. In turn with it `llm.chat_stream` is called directly with the same messages,
which tells what LangChain itself and the plug-in's own work cost.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chunkcache.blend import parse_policy
from chunkcache.errors import PolicyError, PromptError
from chunkcache.eval.data import Case
from chunkcache.eval.measure import OnStep, averages, measure_prompts, table, warm_up_case
from chunkcache.eval.results import Results

BENCH = "chain"
_TIMES = {
    "plain_ttft_s": "plain transformers, s",
    "chain_ttft_s": "the plug-in, s",
    "direct_ttft_s": "direct call, s",
    "retrieve_s": "of the plug-in: its retriever, s",
    "layer_ms": "of the plug-in: outside of llm.chat_stream, ms",
    "overhead_ms": "the plug-in less the direct call, ms",
    "speedup": "plain over plug-in",
}
_MEANS = {
    "equal": "answers equal the direct call's",
    "plain_equal": "answers equal plain transformers'",
    "f1": "F1 with the plug-in",
    "plain_f1": "F1 without",
}


def bench_chain(
    results: Results,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    policy: str = "query",
    rounds: int = 3,
    on_prompt: OnStep | None = None,
) -> Results:
    """Run the chain three ways over `cases`, greedily, with a prompt's chunks precomputed before the clock starts.

    Args:
        results: gets a row of each prompt: `chunks`, `tokens`, `reused_tokens` that stored KV were put in place for;
            seconds to the first piece of the answer `plain_ttft_s`, `chain_ttft_s` over the plug-in, `direct_ttft_s`
            of `llm.chat_stream`, medians of the rounds; of the plug-in's, `retrieve_s` in its retriever and
            `layer_ms` outside of `llm.chat_stream`, which is free of the noise of two prefills; `overhead_ms`, the
            plug-in's less the direct call's; `speedup`, plain over the plug-in's; whether the plug-in's answer is
            `equal` to the direct call's and `plain_equal` to plain transformers'; and `f1` and `plain_f1` of these
            answers, None without accepted ones.
        model: the model.
        tokenizer: its tokenizer; it needs a chat template.
        cases: the prompts.
        policy: of the plug-in and of the direct call.
        rounds: how often the plug-in and the direct call run on each prompt, in turn; plain transformers run once.
        on_prompt: called with (prompts done, prompts in all).

    Raises:
        PolicyError: the policy stores whole prompts, so that the second of two ways would find what the first left.
        PromptError: the tokenizer has no chat template.
    """
    from chunkcache.eval.chain_ways import Ways  # it needs LangChain, which a report does without

    chosen = parse_policy(policy)
    if chosen.stores_in_context or chosen.versioned:
        raise PolicyError(f"{policy} stores the prompts that it has seen, so no two calls on one are alike")
    if not tokenizer.chat_template:
        raise PromptError("the tokenizer has no chat template, which plain transformers need for chat messages")
    ways = Ways(model, tokenizer, policy)
    ways.run(warm_up_case(cases[0]), 1, 0)
    measure_prompts(results, cases, 1, lambda number, case: [ways.run(case, rounds, number)], on_prompt)
    return results


def summary(results: Results) -> dict[str, Any]:
    """Return medians of times and ratios, and means of the rest, over all prompts; and a table of them."""
    of = dict.fromkeys(_TIMES, statistics.median) | dict.fromkeys(_MEANS, statistics.mean)
    [sums] = averages(results.rows, (), "prompt", of)
    shown = [{"name": text, "value": sums[name]} for name, text in {**_TIMES, **_MEANS}.items()]
    title = f"{sums['prompts']} prompts: medians of times, means of the rest"
    tables = [table(title, {"first token": "{name}", "value": "{value:.3f}"}, shown)]
    return {**sums, "tables": tables, "plots": []}
