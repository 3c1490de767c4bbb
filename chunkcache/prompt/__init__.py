"""Texts to token ids: the prompt of a question over chunks, and that of chat messages in which chunks are found."""
