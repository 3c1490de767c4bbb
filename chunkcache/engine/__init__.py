"""A prompt to its first token, and to an answer: plan, selective prefill, decoding."""
