"""Texts to token ids: the prompt of a question over chunks, and that of chat messages in which chunks are found."""

from __future__ import annotations

from chunkcache.prompt.builder import INSTRUCTION, SEPARATOR, PromptBuilder
from chunkcache.prompt.prompt import Prompt, PromptChunk

__all__ = ["INSTRUCTION", "SEPARATOR", "Prompt", "PromptBuilder", "PromptChunk"]
