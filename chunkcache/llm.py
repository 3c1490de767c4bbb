"""`CachedLLM`: wraps a Hugging Face decoder model, and reuses the KV of retrieved chunks."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkcache.blend import Policy, parse_policy
from chunkcache.blend.triton import check_kernels
from chunkcache.defaults import DEFAULT_POLICY
from chunkcache.deprecated import RenamedMethods, renamed_options
from chunkcache.engine.attach import Attachment, AttachMethods
from chunkcache.engine.chunks import ChunkMethods
from chunkcache.engine.engine import Engine, PrefillOutput, PreparedRequest
from chunkcache.engine.generation import Generation, take_policy, with_length
from chunkcache.engine.padding import check_pad
from chunkcache.engine.served import LibraryOptions, ServedMethods, ServedModel
from chunkcache.engine.streaming import TextStream
from chunkcache.prompt import INSTRUCTION, Prompt, PromptBuilder
from chunkcache.prompt.messages import Message, MessageBuilder
from chunkcache.store import Store, default_store, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from chunkcache.engine.batch import Batch
    from chunkcache.engine.calibration import Calibration
    from chunkcache.engine.conversation import Conversation


class CachedLLM(ServedMethods, AttachMethods, ChunkMethods, RenamedMethods):
    """A decoder model that reuses the KV of retrieved chunks.

    Args:
        model: any decoder-only Hugging Face model with RoPE, loaded and in eval mode, also with adapters of peft. It
            is not modified. Where it is changed later, its chunk KV go under another fingerprint from then on.
        tokenizer: the model's tokenizer; its chat template is used when it has one.
        store: a store, or what `open_store` opens, such as `tiered:memory://?max_bytes=2GiB|disk:///var/cache/kv`.
            None takes the environment variable CHUNKCACHE_STORE, and without it 2 GiB of memory; on CUDA a quarter of
            the free memory of the device, and below it a quarter of the free RAM.
        policy: which reused tokens are recomputed, such as `link:k=8`; see `chunkcache.blend.POLICIES`.
        tenant: goes into every key (vLLM's `cache_salt`): requests of another tenant never see these chunk KV.
        instruction: stands before the chunks in every prompt.
        lead_in: text that stands before a chunk while it is computed ahead, and in no prompt; None for a packaged
            one. Passages of the kind that a request has before the chunk are best.
        calibration: what `chunkcache calibrate` found, or its file; None looks for it in the cache folder.
        template_options: keywords for the chat template, such as `{"enable_thinking": False}`. Those that change what
            stands before the chunks are best here, where every call has them; else pass `precompute` the same ones.
        pad: seconds; first tokens are held back to a multiple of it, which hides what was stored. See SECURITY.md.

    Attributes:
        model: the wrapped model, unchanged.
        tokenizer: its tokenizer.
        store: the store that holds chunk KV.
        prompts: builds prompts from texts.
        engine: serves prompts that are built already.
        attachment: lets the model's own `generate()` reuse chunks; see `attach`.

    Raises:
        UnsupportedModelError: the model cannot be served right, or fails its self-check.
        TokenizerMismatchError: the tokenizer is not the model's.
        PromptError: an option is none of the chat template's, or there are several templates and none is chosen.
        PolicyError, StoreURLError, InputError: policy or store are not known, `pad` is no time, or the environment
            variable CHUNKCACHE_KERNELS asks for kernels that are not there.
        CalibrationError: the policy needs a calibration, and there is none or it is damaged.
    """

    def __init__(  # noqa: PLR0913 - everything about a wrapper, by name
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        store: str | Store | None = None,
        policy: str | Policy = DEFAULT_POLICY,
        tenant: str = "",
        instruction: str = INSTRUCTION,
        lead_in: str | None = None,
        calibration: Calibration | str | Path | None = None,
        template_options: Mapping[str, Any] | None = None,
        pad: float | None = None,
        **renamed: Any,
    ) -> None:
        tenant = renamed_options(renamed, {"salt": "tenant"}, "wrap").get("tenant", tenant)
        chosen, pad = parse_policy(policy), check_pad(pad)
        check_kernels()
        self.prompts = PromptBuilder(tokenizer, instruction, lead_in, template_options)
        store = store if store is not None else os.environ.get("CHUNKCACHE_STORE")
        store = store if store is not None else default_store({weight.device for weight in model.parameters()})
        self._owns_store = isinstance(store, str)
        self.store: Store = open_store(store) if isinstance(store, str) else store
        self.model: Any = model
        self.tokenizer = tokenizer
        options = LibraryOptions(self.store, tenant, self.prompts.lead_in)
        served = ServedModel(model, tokenizer, options, calibration)
        served.latest.tuning.resolve(chosen)  # refuses one that lacks a calibration
        self._serve(Engine(served, tokenizer, chosen, pad))

    def _serve(self, engine: Engine) -> None:
        self.engine = engine
        self._messages = MessageBuilder(self.prompts, engine.served.registry)
        self.attachment = Attachment(engine)

    def for_tenant(self, tenant: str) -> CachedLLM:
        """Return a wrapper of the same model and store for another tenant's chunks; it costs next to nothing."""
        twin = copy.copy(self)
        twin._owns_store = False
        engine = self.engine
        twin._serve(Engine(engine.served.for_tenant(tenant), engine.tokenizer, engine.policy, engine.pad))
        return twin

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        on_status: Callable[[str], None] | None = None,
        **options: Any,
    ) -> CachedLLM:
        """Load a model with `chunkcache.load_model`, and wrap it.

        Args:
            name: an alias, a local folder, a GGUF file or a Hugging Face id.
            device: where it runs; None for the fastest there is.
            dtype: auto, float32, bfloat16 or float16.
            on_status: called with what is being done.
            options: of the class: `store`, `policy` and so on.

        Raises:
            ModelNotFoundError: no model can be loaded under that name.
        """
        from chunkcache.models import load_model

        model, tokenizer = load_model(name, device=device, dtype=dtype, on_status=on_status)
        return cls(model, tokenizer, **options)

    @property
    def policy(self) -> Policy:
        """The policy of calls that name none; may be set, also to a string."""
        return self.engine.policy

    @policy.setter
    def policy(self, policy: str | Policy) -> None:
        self.engine.policy = parse_policy(policy)

    def resolve_policy(self, policy: str | Policy | None) -> Policy:
        """Return the policy of a call, the wrapper's if it names none, with nothing left open."""
        return self.engine.resolve_policy(policy)

    def close(self) -> None:
        """Give the model its own `generate()` back, and close the store if it was opened here."""
        self.detach()
        if self._owns_store:
            self.store.close()

    def __enter__(self) -> CachedLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        question: str,
        chunks: Sequence[Any] = (),
        *,
        system: str | None = None,
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Generation:
        """Answer `question` over `chunks`.

        Args:
            question: the text to answer.
            chunks: retrieved texts, or documents with `.page_content` or `.text`, in the order they shall stand in
                the prompt; repeats are allowed.
            system: system prompt; None for the chat template's own.
            policy: overrides the wrapper's policy for this call.
            max_new_tokens: length of the answer at most. None is what the keyword `max_length` says, or the given
                generation config, or the model's own, or else 64.
            options: any keyword of transformers' `generate()` that makes sense for one sequence; `adapter=`, the
                name of the peft adapter that is active for this call, with chunk KV of its own; `template_options=`,
                which come before those of `wrap`; `reuse="exact"`, for an answer that is compared with others: only
                KV that full prefill would compute are reused.

        Raises:
            PromptError: question or chunk is empty or no text.
            InputError: an option is unknown, or asks for more than one sequence.
            ContextLengthError: prompt and answer do not fit the model's context.
            PolicyError: the policy is unknown.
        """
        return self.engine.generate(self._prepare(question, chunks, system, policy, max_new_tokens, options))

    def stream(
        self,
        question: str,
        chunks: Sequence[Any] = (),
        *,
        system: str | None = None,
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> TextStream:
        """Answer like `generate`, piece by piece; leaving the loop early ends it. `.result` is the `Generation`."""
        return self.engine.stream(self._prepare(question, chunks, system, policy, max_new_tokens, options))

    def prefill(
        self,
        question: str,
        chunks: Sequence[Any] = (),
        *,
        system: str | None = None,
        policy: str | Policy | None = None,
        **options: Any,
    ) -> PrefillOutput:
        """Prefill the prompt and return the next token's logits with the cache of the whole prompt.

        Options are `adapter=`, `reuse=` and `template_options=`, as for `generate`.
        """
        return self.engine.prefill(self._prepare(question, chunks, system, policy, None, options))

    def prepare_inputs(
        self,
        question: str,
        chunks: Sequence[Any] = (),
        *,
        system: str | None = None,
        policy: str | Policy | None = None,
        cache: str = "dynamic",
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Return `input_ids`, `attention_mask` and `past_key_values` for a plain `model.generate(**inputs)`.

        All tokens of the prompt but the last are prefilled here; `generate()` starts with the last one, which
        costs one decoding step more than `llm.generate`. Where the model's generation config would not go on from a
        cache (`use_cache`, `cache_implementation`), the keywords that correct it are among them. Options as for
        `prefill`.

        Args:
            question: as in `generate`, and so are `chunks`, `system` and `policy`.
            cache: `dynamic`, or `static` for a `StaticCache`, with which `generate()` compiles its steps on a GPU. It
                has room for `max_new_tokens` behind the prompt, which is then among the keywords.
            max_new_tokens: length of the answer at most; None as in `generate`.
            options: as for `prefill`.

        Raises:
            InputError: there is no such cache, or as in `prefill`.
        """
        from chunkcache.engine.inputs import inputs_for_generate

        request = self._prepare(question, chunks, system, policy, max_new_tokens, options)
        return inputs_for_generate(self.engine, request, cache)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Generation:
        """Answer the last of some messages, reusing the chunks that are found in their texts.

        Args:
            messages: mappings with `role` and `content`, as for `apply_chat_template`. The content is text, in which
                chunks are found that were precomputed, or registered, by this wrapper; or a list of texts and
                `PromptChunk`s, which read like the question and the chunks of `generate`.
            policy: as in `generate`, and so are the others.

        Raises:
            PromptError: a message is not of this form, or the chat template refuses them.
            InputError, ContextLengthError, PolicyError: as in `generate`.
        """
        build = partial(self._messages.build, messages, options.pop("template_options", None))
        return self.engine.generate(self.engine.prepare(build, policy, max_new_tokens, options))

    def chat_stream(
        self,
        messages: Sequence[Message],
        *,
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> TextStream:
        """Answer like `chat`, piece by piece; see `stream`."""
        build = partial(self._messages.build, messages, options.pop("template_options", None))
        return self.engine.stream(self.engine.prepare(build, policy, max_new_tokens, options))

    def chat_prompt(self, messages: Sequence[Message], template_options: Mapping[str, Any] | None = None) -> Prompt:
        """Return the prompt that `chat` would answer."""
        return self._messages.build(messages, template_options)

    def raw_prompt(self, text: str) -> Prompt:
        """Return a prompt that is `text` as it is, without a chat template; known chunks are found in it."""
        return self._messages.raw(text)

    def conversation(
        self, system: str | None = None, template_options: Mapping[str, Any] | None = None
    ) -> Conversation:
        """Return a new conversation, in which each question goes on from the KV of those before it."""
        from chunkcache.engine.conversation import Conversation

        return Conversation(self.engine, self._messages, system, template_options)

    def generate_batch(
        self,
        requests: Iterable[tuple[Any, ...]],
        *,
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        max_batch: int | None = None,
        max_kv_bytes: int | None = None,
        reorder: bool = False,
        on_batch: Callable[[Batch], None] | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Answer many requests offline, those over the same chunks together; see `chunkcache.engine.batch`.

        Args:
            requests: of (question, chunks, system) each, the last two optional; as for `generate`.
            policy: as in `generate`. One that looks at the question looks at those of all requests of a batch. Under
                a guard, whose bound is for one question, requests are answered one by one.
            max_new_tokens: as in `generate`.
            max_batch: sequences that are decoded together at most; 8 by default.
            max_kv_bytes: bytes of KV that a batch may need, apart from what the store holds; None for no bound.
            reorder: sort the chunks of each prompt so that more prompts begin alike. It changes answers.
            on_batch: called with every `Batch` that is done, and its answers: so they are kept if a later one fails.
            options: any keyword of transformers' `generate()` that makes sense for a batch. A logits processor sees
                ids that are padded with the prompt's first token, between what is shared and the question.

        Returns:
            the answers, in the order of the requests. Their `output` is on the CPU, and padded likewise.

        Raises:
            PromptError, ContextLengthError, InputError: as `generate`, with the index of the request, and where one
                does not fit `max_kv_bytes`; for an option that padding misleads; before any is answered.
            PolicyError: the policy is unknown.
        """
        from chunkcache.engine.batch import MAX_BATCH, Batcher, Limits

        limits = Limits(MAX_BATCH if max_batch is None else max_batch, max_kv_bytes)
        chosen = self.resolve_policy(take_policy(options, policy))
        prompts = self.prompts.with_options(options.pop("template_options", None))
        options = with_length(self.engine.model, options, max_new_tokens)
        return Batcher(self.engine, prompts, chosen, options, limits, reorder).run(requests, on_batch)

    def _prepare(
        self,
        question: str,
        chunks: Sequence[Any],
        system: str | None,
        policy: str | Policy | None,
        max_new_tokens: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> PreparedRequest:
        options = dict(options or {})
        prompts = self.prompts.with_options(options.pop("template_options", None))
        build = partial(prompts.build, question, chunks, system)
        return self.engine.prepare(build, policy, max_new_tokens, options)


wrap = CachedLLM
