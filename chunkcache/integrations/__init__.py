"""Plug-ins: LangChain, LlamaIndex and the transformers pipeline. Each is imported by its own name."""
