"""Every error this library raises on purpose, as one small tree.

ChunkCacheError
├── InputError                   the caller can fix it; the command line exits with 2
│   ├── PromptError              an empty question, a batch, a chat template that hides its parts
│   ├── ContextLengthError       a prompt or a chunk longer than the model's context
│   ├── PolicyError              an unknown policy or policy option
│   ├── StoreURLError            an unknown store or store option
│   ├── TokenizerMismatchError   a tokenizer that is not the model's
│   ├── ModelNotFoundError       a model name, folder or file that cannot be loaded
│   ├── DocumentError            a document folder or file that cannot be used
│   ├── CalibrationError         a policy needs a calibration that is missing, damaged or another model's
│   ├── PeerError                a system to be measured beside this one is unknown, not set up, or failed
│   └── ResultsError             a file of measurements that is damaged, or of another measurement than this
├── ServingError                 any of these inside LlamaIndex, which would swallow it; it is the `__cause__`
├── QueueFullError               the server has too much to do, or is shutting down; ask again later
├── EntryLostError               a stored entry that went away, or proved damaged, while it was being read
└── UnsupportedModelError        this model cannot be served right; the message says why
    └── SelfCheckError           the model looked right, but its self-check did not agree

A message says what was wrong, with the value, and what to do about it.
"""

from __future__ import annotations


class ChunkCacheError(Exception):
    """Base class of every error raised by chunkcache."""


class InputError(ChunkCacheError, ValueError):
    """The caller's input cannot be used as it is."""


class PromptError(InputError):
    """The prompt cannot be built, or is not one sequence."""


class ContextLengthError(InputError):
    """A prompt or a chunk is longer than the model's context."""


class PolicyError(InputError):
    """A policy string names an unknown policy or option, or a value out of range."""


class StoreURLError(InputError):
    """A store URL names an unknown store or option, or a value out of range."""


class TokenizerMismatchError(InputError):
    """The tokenizer does not belong to the model."""


class ModelNotFoundError(InputError):
    """No model could be loaded under the given name, folder or file."""


class DocumentError(InputError):
    """A document folder or file is missing, empty or unreadable."""


class CalibrationError(InputError):
    """A policy needs a calibration of this model, and there is none that can be used."""


class PeerError(InputError):
    """A peer is unknown, not set up, cannot serve the model, or failed; the message names it."""


class ResultsError(InputError):
    """A file of measurements is damaged, in use, or was made with other settings."""


class ServingError(ChunkCacheError):
    """A request failed inside a framework that takes ValueErrors for answers it cannot read.

    It is no ValueError, so it reaches the caller. The message is that of the error it stands for, its `__cause__`.
    """


class QueueFullError(ChunkCacheError):
    """A request was not taken on.

    Attributes:
        waiting: requests that wait already.
        draining: whether none is taken on any more.
    """

    def __init__(self, waiting: int, draining: bool) -> None:
        super().__init__(
            "the server is shutting down; ask another" if draining else f"{waiting} requests wait already; ask later"
        )
        self.waiting, self.draining = waiting, draining


class EntryLostError(ChunkCacheError):
    """A layer of a stored chunk KV is damaged or gone. A request computes the chunk itself instead.

    Attributes:
        key: the entry's.
    """

    def __init__(self, key: object, why: str) -> None:
        super().__init__(f"entry {key} is lost: {why}")
        self.key = key


class UnsupportedModelError(ChunkCacheError):
    """The model's architecture or configuration cannot be served right."""


class SelfCheckError(UnsupportedModelError):
    """Selective prefill or re-rotation disagreed with the model's own prefill at wrap time."""


_DISTRIBUTIONS = {"llama_index": "llama-index-core", "markdown_it": "markdown-it-py"}  # named unlike their modules


def missing_extra(extra: str, what: str, error: ImportError) -> InputError:
    """Return the error of a feature whose package is not installed.

    Args:
        extra: the extra of chunkcache that has the package.
        what: the feature, as the subject of a sentence.
        error: raised by the import.
    """
    module = (error.name or "a package that is not installed").partition(".")[0]
    package = _DISTRIBUTIONS.get(module, module.replace("_", "-"))
    return InputError(f'{what} needs {package} ({error}): pip install "chunkcache[{extra}]"')
