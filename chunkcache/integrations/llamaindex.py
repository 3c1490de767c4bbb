r"""The LlamaIndex plug-in: a node postprocessor that prepares KV, an LLM that reuses them, and an embedding.

    llm = ChunkCacheLLM.from_model("smollm2-135m-instruct")
    engine = index.as_query_engine(llm=llm, node_postprocessors=[ChunkCachePostprocessor(llm)])

Index, retriever, templates and response synthesizer stay as they are. The synthesizer renders nodes as text, and the
LLM finds the known texts in its messages. So a node is reused where its text stands whole:

- `compact` (the default), `compact_accumulate` and `tree_summarize` join all nodes by blank lines, and divide the
  whole where it is longer than the window. A node on the border is cut and computed with the prompt, the others are
  reused.
- `refine` and `accumulate` put each node into a prompt of its own, and divide one only if it is longer than that.
- `simple_summarize` writes its text as Python writes a list of strings, with `\n` for the end of a line. Only nodes
  of one line are found there; take `compact`.
- Earlier answers, in the later prompts of `refine`, `compact` and `tree_summarize`, are new and computed.

Set `Settings.tokenizer` to `llm.token_ids`, or LlamaIndex counts the window in another tokenizer's tokens. A prompt
that is too long then, and any other request that cannot be served, is a ServingError.
"""

from __future__ import annotations

from chunkcache.errors import missing_extra

try:
    from chunkcache.integrations.llamaindex_llm import ChunkCacheLLM
    from chunkcache.integrations.llamaindex_nodes import ChunkCacheEmbedding, ChunkCachePostprocessor
    from chunkcache.integrations.precomputing import CHUNK_KEY
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("llama_index"):
        raise
    raise missing_extra("llamaindex", "the LlamaIndex plug-in", error) from error

__all__ = ["CHUNK_KEY", "ChunkCacheEmbedding", "ChunkCacheLLM", "ChunkCachePostprocessor"]
