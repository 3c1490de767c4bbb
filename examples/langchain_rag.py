"""RAG over a folder with LangChain, reusing the KV of passages: python langchain_rag.py [FOLDER] [QUESTION]"""

import sys
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from chunkcache.integrations.langchain import ChatChunkCache, ChunkCacheRetriever, ChunkRetriever
from chunkcache.retriever import Retriever, load_documents

folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "corpus"
question = sys.argv[2] if len(sys.argv) > 2 else "Who designed the lighthouse called Hexel Light?"

chat = ChatChunkCache.from_model("smollm2-135m-instruct", temperature=0, max_tokens=40)
chunks = Retriever.build(load_documents(folder), chat.llm.tokenizer, size=256)
retriever = ChunkCacheRetriever(retriever=ChunkRetriever(retriever=chunks, k=2), llm=chat.llm)

prompt = ChatPromptTemplate.from_template(
    "Answer the question from the passages below.\n\n{context}\n\nQuestion: {question}"
)
context = retriever | (lambda documents: "\n\n".join(document.page_content for document in documents))
chain = {"context": context, "question": RunnablePassthrough()} | prompt | chat | StrOutputParser()

for piece in chain.stream(question):
    print(piece, end="", flush=True)
print()
