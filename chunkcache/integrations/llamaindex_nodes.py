"""Nodes on their way through LlamaIndex: embedded by our embedder, and prepared for the prompt once retrieved."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from pydantic import Field, InstanceOf, PrivateAttr

from chunkcache.blend import Policy
from chunkcache.integrations.llamaindex_errors import let_through
from chunkcache.integrations.llamaindex_llm import ChunkCacheLLM
from chunkcache.integrations.precomputing import CHUNK_KEY, BackgroundPrecompute
from chunkcache.llm import CachedLLM
from chunkcache.retriever.embedder import Embedder


class ChunkCachePostprocessor(BaseNodePostprocessor):
    """Brings the KV of retrieved nodes nearer, and has what is missing computed.

    Nodes come back in their order, if no other is asked for, as copies with one more entry in their metadata,
    `CHUNK_KEY`, which is shown to neither the LLM nor an embedding. One that cannot be cached, because it is white
    space or longer than the model's context, comes back as it is. This must be the last postprocessor that changes
    what nodes say. A node's document, for `llm.forget(document=...)`, is its `ref_doc_id`.

    Attributes:
        llm: what will answer.
        precompute: when KV that are missing are computed. "now" is before the nodes are passed on, which costs a
            request nothing: it would compute them itself. "background" is meanwhile, and "never" leaves it to the
            request.
        policy: the policy of the requests; None for the llm's own.
        reorder: by how many ranks a node may move, so that more stand behind the same ones as in an earlier prompt;
            that helps policies that store chunks in their context: `prefix`, `cachecraft`.
        distinct: whether nodes that say nothing new are left out: repeats, and what another says whole.
    """

    llm: InstanceOf[CachedLLM] | InstanceOf[ChunkCacheLLM] = Field(exclude=True, repr=False)
    precompute: Literal["now", "background", "never"] = "now"
    policy: str | InstanceOf[Policy] | None = None
    reorder: int = Field(default=0, ge=0)
    distinct: bool = False

    _ahead: BackgroundPrecompute = PrivateAttr()

    def __init__(self, llm: CachedLLM | ChunkCacheLLM, **fields: Any) -> None:
        """Raise PolicyError when the policy is unknown."""
        super().__init__(**{"llm": llm, **fields})
        if isinstance(self.llm, CachedLLM):
            wrapped, policy = self.llm, self.policy
        else:
            wrapped, policy = self.llm.llm, self.llm.policy if self.policy is None else self.policy
        self._ahead = BackgroundPrecompute(wrapped, self.precompute, None, policy, self.reorder, self.distinct)

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex knows this class by."""
        return "ChunkCachePostprocessor"

    @property
    def ahead(self) -> BackgroundPrecompute:
        """What prefetches and precomputes; it counts what went wrong, and can be waited for and closed."""
        return self._ahead

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        texts = [found.node.get_content(metadata_mode=MetadataMode.LLM) for found in nodes]
        with let_through():
            order = self._ahead.order(texts)
            nodes, texts = [nodes[index] for index in order], [texts[index] for index in order]
            digests = self._ahead.take(texts, [found.node.ref_doc_id for found in nodes])
        return [
            found if digest is None else found.model_copy(update={"node": _keyed(found.node, digest)})
            for found, digest in zip(nodes, digests, strict=True)
        ]


def _keyed(node: BaseNode, digest: str) -> BaseNode:
    """Return a copy of a node, which may be the very object that the index holds, with its key."""
    unseen = {
        name: [*(key for key in getattr(node, name) if key != CHUNK_KEY), CHUNK_KEY]
        for name in ("excluded_llm_metadata_keys", "excluded_embed_metadata_keys")
    }
    return node.model_copy(update={"metadata": {**node.metadata, CHUNK_KEY: digest}, **unseen})


class ChunkCacheEmbedding(BaseEmbedding):
    """`chunkcache.retriever.Embedder` for LlamaIndex; by default the packaged all-MiniLM-L6-v2, so no hub is asked.

    Args:
        model: a folder or a name on the Hugging Face hub.
        device: where it runs.
        embed_batch_size: texts embedded together.

    Raises:
        ModelNotFoundError: it cannot be loaded.
    """

    _embedder: Embedder = PrivateAttr()

    def __init__(
        self, model: str | Path | None = None, *, device: str | None = None, embed_batch_size: int = 32, **fields: Any
    ) -> None:
        name = "all-MiniLM-L6-v2" if model is None else str(model)
        super().__init__(**{"model_name": name, "embed_batch_size": embed_batch_size, **fields})
        self._embedder = Embedder(model, device=device, batch_size=embed_batch_size)

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex knows this class by."""
        return "ChunkCacheEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return [float(value) for value in self._embedder.embed_query(query)[0]]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return [[float(value) for value in vector] for vector in self._embedder.embed(texts)]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
