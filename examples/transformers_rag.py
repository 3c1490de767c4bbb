"""Plain transformers: compute the KV of some passages once, and answer questions over them."""

from pathlib import Path

from transformers import pipeline

import chunkcache
import chunkcache.integrations.transformers  # registers the task "chunkcache-rag"
from chunkcache.retriever import load_documents, split

# Any causal language model and its tokenizer will do, loaded with from_pretrained or so.
model, tokenizer = chunkcache.load_model("smollm2-135m-instruct")
(document,) = load_documents(Path(__file__).parent / "corpus" / "hexel-light.md")
texts = [chunk.text for chunk in split(document, tokenizer, size=256)]

llm = chunkcache.wrap(model, tokenizer)
print(llm.precompute(texts))  # once; requests find them in any order

question = "How high is the tower of Hexel Light?"
answer = llm.generate(question, chunks=texts, max_new_tokens=40)
print(f"{question}\n{answer.text}\n({answer.stats.hits} passages reused, first token after {answer.ttft_s:.2f} s)")

rag = pipeline("chunkcache-rag", model=model, tokenizer=tokenizer, store=llm.store, max_new_tokens=40)
question = "When was the lamp of Hexel Light first lit?"
answer = rag({"question": question, "chunks": texts[::-1]})
print(f"{question}\n{answer['generated_text']}\n({answer['stats']['hits']} passages reused)")
