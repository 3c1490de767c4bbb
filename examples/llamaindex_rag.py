"""LlamaIndex: questions over a folder, with the KV of retrieved nodes reused from question to question."""

import sys
from pathlib import Path

from llama_index.core import Settings, SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter

from chunkcache.integrations.llamaindex import ChunkCacheEmbedding, ChunkCacheLLM, ChunkCachePostprocessor

folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("corpus")

llm = Settings.llm = ChunkCacheLLM.from_model("smollm2-135m-instruct", temperature=0, max_tokens=40)
Settings.tokenizer = llm.token_ids
Settings.embed_model = ChunkCacheEmbedding()
Settings.node_parser = SentenceSplitter(chunk_size=256, chunk_overlap=0)

documents = SimpleDirectoryReader(folder, filename_as_id=True).load_data()
index = VectorStoreIndex.from_documents(documents)
engine = index.as_query_engine(similarity_top_k=3, node_postprocessors=[ChunkCachePostprocessor(llm)])

for question in ("How tall is the tower of Hexel Light?", "Who was the designer of Hexel Light?"):
    print(f"{question}\n{engine.query(question)}")
