"""What a server is made of: one model, a scheduler, and for each tenant a view of its own chunks."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from queue import Queue
from typing import Any

from chunkcache.engine.engine import PreparedRequest
from chunkcache.engine.generation import end_ids, needs_finished_cache, setting
from chunkcache.engine.guided import Guide, Guides
from chunkcache.engine.sampling import Sampled, Sampler
from chunkcache.engine.scheduler import Limits, Scheduler
from chunkcache.engine.ticket import Deliver, Failed, Finished
from chunkcache.errors import InputError
from chunkcache.kv import TokenIds
from chunkcache.llm import CachedLLM
from chunkcache.prompt import Prompt
from chunkcache.serve.adapters import ServedAdapters
from chunkcache.serve.background import Background
from chunkcache.serve.errors import HTTPError
from chunkcache.serve.messages import messages_of, name_of, passage_of
from chunkcache.serve.protocol import ChatRequest, CompletionRequest, Sampling
from chunkcache.serve.rag import Found, Indexes
from chunkcache.serve.tenants import Tenant
from chunkcache.serve.tool_parser import CallParser
from chunkcache.serve.tools import Calling, calling

VIEWS = 256  # salts of one tenant whose known texts are kept; those of others are found by their documents only
WARMED = 16  # tenants whose lead-in is computed when the server starts
_WARM_S = 600.0
_DIGITS = 10  # of a token id
_GREEDY = 1e-5  # temperatures below it, by which logits would overflow


@dataclass(frozen=True)
class Choice:
    """One answer that is asked for.

    Attributes:
        llm: the tenant's view.
        request: the prompt, and how it is served.
        sampler: chooses the tokens.
        documents: what the client calls the documents that chunks are, by the token ids of these.
        found: what was found for it in an index.
        shown: special tokens that are part of its text.
        calls: makes what finds its tool calls; None where it may call nothing.
    """

    llm: CachedLLM
    request: PreparedRequest
    sampler: Sampler
    documents: Mapping[TokenIds, str] = field(default_factory=dict, repr=False)
    found: Found | None = field(default=None, repr=False)
    shown: frozenset[int] = frozenset()
    calls: Callable[[], CallParser] | None = field(default=None, repr=False)


class Service:
    """Turns what clients send into requests to the model.

    Args:
        llm: the wrapped model; its policy, store and instruction are the server's.
        name: what clients call the model.
        limits: what is served at once.

    Attributes:
        llm: as given.
        name: as given.
        adapters: the model's adapters, which clients name as models.
        scheduler: answers.
        watched: whether requests keep what their questions looked at.
        background: does what no answer waits for.
        indexes: the documents of tenants.

    Raises:
        InputError: the model's generation config asks for beam search, or for classifier-free guidance.
    """

    def __init__(self, llm: CachedLLM, name: str, limits: Limits | None = None) -> None:
        if needs_finished_cache(llm.model, {}):
            raise InputError(
                "the model's generation config asks for beam search, which is not served: set its num_beams to 1"
            )
        if (setting(llm.model, {}, "guidance_scale") or 1) != 1:
            raise InputError(
                "the model's generation config has a guidance_scale, which needs a second prompt and is not served: "
                "set it to None"
            )
        self.llm, self.name = llm, name
        self.adapters = ServedAdapters(llm.engine.served.adapters, name)
        self.scheduler = Scheduler(llm.engine, limits)
        self.watched = False
        self.background, self.indexes = Background(self.scheduler), Indexes(self.view)
        self._created = int(time.time())
        self._lock = threading.Lock()
        self._views: dict[str, OrderedDict[str, CachedLLM]] = {}  # by tenant: salts of one evict none of another

    @cached_property
    def _guides(self) -> Guides:
        return Guides(self.llm.tokenizer, _vocab_size(self.llm), end_ids(self.llm.model, {}))

    def view(self, tenant: Tenant, salts: Sequence[str] = ()) -> CachedLLM:
        """Return what a tenant sees, who may divide it further by salts (vLLM's `cache_salt`).

        It may wait for a call that has an adapter active, so it is not for the event loop.
        """
        if not tenant.name and not salts:
            return self.llm
        key = "/".join([tenant.name, *(hashlib.sha256(salt.encode()).hexdigest() for salt in salts)])
        with self._lock:
            views = self._views.setdefault(tenant.name, OrderedDict())
            if key in views:
                views.move_to_end(key)
                return views[key]
        made = self.llm.for_tenant(key)  # it may wait for a call with an adapter, and holds up nobody meanwhile
        with self._lock:
            view = views.setdefault(key, made)
            views.move_to_end(key)
            if len(views) > VIEWS:
                del views[next(old for old in views if old != tenant.name)]
            return view

    def views_of(self, tenant: Tenant) -> dict[str, CachedLLM]:
        """Return the known views of a tenant, its own and those of salts, by what their chunks belong to."""
        own = {tenant.name: self.view(tenant)}
        with self._lock:
            return own | dict(self._views.get(tenant.name, {}))

    def warm(self, tenants: Sequence[Tenant] = ()) -> None:
        """Compute the lead-in of chunks for tenants, and decode two tokens: else the first request would wait for it.

        Raises:
            Exception: the model fails.
        """
        for tenant in list(tenants)[:WARMED] or [Tenant()]:
            llm = self.view(tenant)
            policy, prefix = llm.resolve_policy(None), llm.prompts.prefix()
            with llm.engine.served.session() as served:
                context = served.library.ref_for((0,), prefix, policy).context_ids
                if policy.lead_in() and context != prefix:
                    served.library.prefix(context)
        llm, ended = self.llm, Queue[Finished | Failed]()
        request = llm.engine.prepare(lambda: Prompt(llm.prompts.encode("Hello"), 0), "full", 2, {"do_sample": False})
        sampler = Sampler(llm.model, request.options, request.prompt.token_ids)
        deliver: Deliver = lambda event: None if isinstance(event, Sampled) else ended.put(event)  # noqa: E731
        self.scheduler.submit(request, sampler, deliver)
        outcome = ended.get(timeout=_WARM_S)
        if isinstance(outcome, Failed):
            raise outcome.error

    def chat(self, asked: ChatRequest, tenant: Tenant) -> list[Choice]:
        """Return the answers that a chat asks for.

        Raises:
            HTTPError, InputError: it cannot be served.
        """
        self._check(asked)
        given = dict(asked.chat_template_kwargs or {})
        if "tools" in given:
            raise HTTPError(400, "chat_template_kwargs: tools are a field of their own", param="chat_template_kwargs")
        if "{" in str(given.get("chat_template")):  # it may loop for hours
            message = "chat_template names a template of the tokenizer's; one of your own is not taken"
            raise HTTPError(400, message, param="chat_template_kwargs")
        found = None if asked.rag is None else self.indexes.search(asked, tenant)
        if found is not None:
            asked = asked.model_copy(update={"documents": [*(asked.documents or ()), *found.documents]})
        messages = messages_of(asked.messages, asked.documents or ())
        llm = self.view(tenant, asked.salts())
        may_call = self._calling(asked)
        if may_call is not None:
            given["tools"] = may_call.tools
        schema = None if asked.response_format is None else asked.response_format.to_follow()
        guide: Callable[[], Guide] | None = None
        if may_call is not None and may_call.grammar is not None:
            guide = partial(self._guides.lark, may_call.grammar)
        elif schema is not None:
            guide = partial(self._guides.json, schema)
        choices = self._choices(llm, asked, [partial(llm.chat_prompt, messages, given)], guide)
        named = {llm.prompts.chunk(passage_of(d)): name for d in asked.documents or () if (name := name_of(d))}
        shown = frozenset() if may_call is None else may_call.shown
        calls = None if may_call is None else may_call.parser
        return [replace(choice, documents=named, found=found, shown=shown, calls=calls) for choice in choices]

    def _calling(self, asked: ChatRequest) -> Calling | None:
        prompts = self.llm.prompts.with_options(asked.chat_template_kwargs)
        template = prompts.template.source_for(tools=bool(asked.tools))
        return calling(asked, template, self.llm.tokenizer)

    def completion(self, asked: CompletionRequest, tenant: Tenant) -> list[Choice]:
        """Return the answers that a completion asks for.

        Raises:
            HTTPError, InputError: it cannot be served.
        """
        self._check(asked)
        for name in ("echo", "best_of", "suffix"):
            if getattr(asked, name) not in (None, False, 1, asked.n if name == "best_of" else None):
                raise HTTPError(400, f"{name} is not served here; leave it out", "unsupported_parameter", name)
        llm = self.view(tenant, asked.salts())
        prompt = asked.prompt
        prompts = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str) else [prompt]
        if prompts == [[]]:
            raise HTTPError(400, "the prompt is empty; pass text or token ids", param="prompt")
        return self._choices(llm, asked, [_raw(llm, each) for each in prompts])

    def about(self, name: str | None = None) -> dict[str, Any]:
        """Return what clients are told of the model, or of one of its adapters.

        Raises:
            HTTPError: there is no such model.
        """
        adapter = None if name is None else self.adapters.adapter_of(name)
        return {
            "id": name or self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "chunkcache",
            "max_model_len": self.llm.max_tokens,
            **({} if adapter is None else {"parent": self.name}),
        }

    def stops(self, asked: Sampling) -> list[str]:
        """Return the strings that end an answer: those of the request, and of the model's generation config."""
        own = setting(self.llm.model, {}, "stop_strings") or ()
        return [*asked.stops(), *([own] if isinstance(own, str) else own)]

    def seconds(self, most: float | None) -> float | None:
        """Return after how many seconds an answer ends: `most`, or what the model's generation config says."""
        own = setting(self.llm.model, {}, "max_time")
        return min((limit for limit in (most, own) if limit is not None), default=None)

    def token_text(self, token_id: int) -> str:
        """Return the text of one token."""
        return str(self.llm.tokenizer.decode([token_id]))

    def _check(self, asked: Sampling) -> None:
        self.adapters.adapter_of(asked.model)
        for name in ("frequency_penalty", "presence_penalty"):
            if getattr(asked, name):
                raise HTTPError(
                    400, f"{name} is not served here; repetition_penalty is", "unsupported_parameter", name
                )

    def _choices(
        self,
        llm: CachedLLM,
        asked: Sampling,
        builds: Sequence[Callable[[], Prompt]],
        guide: Callable[[], Guide] | None = None,
    ) -> list[Choice]:
        most = self.scheduler.limits.waiting
        if len(builds) * asked.n > most:
            message = f"{len(builds)} prompts and n={asked.n} are too many answers; ask for {most} or fewer at once"
            raise HTTPError(400, message, param="n" if len(builds) == 1 else "prompt")
        options = {**_options(asked), "adapter": self.adapters.adapter_of(asked.model)}
        size = _vocab_size(llm)
        if any(int(name) >= size for name in asked.logit_bias or ()):
            raise HTTPError(400, f"logit_bias: the model has {size} token ids", param="logit_bias")
        policy = "full" if asked.reuse == "off" else None
        if asked.reuse == "exact":
            options["reuse"] = "exact"
        choices = []
        for build in builds:
            request = replace(llm.engine.prepare(build, policy, asked.length(), options), watched=self.watched)
            for number in range(asked.n):
                seed = None if asked.seed is None else asked.seed + number
                sampling = {**request.options, **({} if seed is None else {"seed": seed})}
                follows = None if guide is None else guide()
                sampler = Sampler(llm.model, sampling, request.prompt.token_ids, asked.likeliest(), follows)
                choices.append(Choice(llm, request, sampler))
        return choices


def _options(asked: Sampling) -> dict[str, Any]:
    """Return the keywords of `generate()` that a request stands for."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    options = {name: value for name in names if (value := getattr(asked, name)) is not None}
    if options.get("temperature", 1.0) < _GREEDY:
        options = {name: options[name] for name in options if name == "repetition_penalty"}
        options["do_sample"] = False
    elif options.keys() - {"repetition_penalty"}:
        options["do_sample"] = True
    if asked.logit_bias:
        if not all(name.isdecimal() and len(name) < _DIGITS for name in asked.logit_bias):
            raise HTTPError(400, "logit_bias maps token ids to numbers", param="logit_bias")
        options["sequence_bias"] = [[[int(name)], value] for name, value in asked.logit_bias.items()]
    return options


def _vocab_size(llm: CachedLLM) -> int:
    return int(llm.model.config.get_text_config().vocab_size)


def _raw(llm: CachedLLM, prompt: Any) -> Callable[[], Prompt]:
    """Return what builds a prompt that is text, or token ids, as it is."""
    if isinstance(prompt, str):
        return lambda: llm.raw_prompt(prompt)
    size = _vocab_size(llm)
    wrong = next((each for each in prompt if not 0 <= each < size), None)
    if wrong is not None:
        raise HTTPError(400, f"{wrong} is no token id: the model has {size}", param="prompt")
    return lambda: Prompt(tuple(prompt), 0)
