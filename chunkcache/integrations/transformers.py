"""A transformers pipeline that answers questions over chunks; importing this module registers its task.

import chunkcache.integrations.transformers
from transformers import pipeline

rag = pipeline("chunkcache-rag", model="HuggingFaceTB/SmolLM2-135M-Instruct", store="memory://")
rag({"question": "How high is it?", "chunks": ["Mawdle Fell is 412 metres high."]})["generated_text"]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from chunkcache.blend import Policy
from chunkcache.defaults import DEFAULT_POLICY
from chunkcache.engine.calibration import Calibration
from chunkcache.engine.generation import Generation
from chunkcache.errors import PromptError
from chunkcache.llm import wrap
from chunkcache.prompt.builder import INSTRUCTION
from chunkcache.store import Store

TASK = "chunkcache-rag"


class Answer(TypedDict):
    """The answer to one input, the seconds to its first token, and `RequestStats` as a dict."""

    generated_text: str
    ttft_s: float
    stats: dict[str, Any]


class ChunkCacheRagPipeline(Pipeline):
    """Answers `{"question": str, "chunks": [str, ...]}`, if need be with `"system": str`; other keys are ignored.

    One input gives one `Answer`, a list gives a list, a generator or Dataset gives an iterator. Inputs run one by
    one, and what was computed of the chunks of one is reused by those after it.

    Args:
        model: loaded by `pipeline()`, if it was a name.
        tokenizer: likewise.
        store: where chunk KV are kept, as in `chunkcache.wrap`.
        policy: as in `chunkcache.wrap`.
        tenant: as in `chunkcache.wrap`.
        calibration: as in `chunkcache.wrap`.
        instruction: as in `chunkcache.wrap`.
        options: of transformers' `Pipeline`; `system`, for inputs with none; and keywords of `generate()`.
            A call may have these, too, and a `policy`.

    Attributes:
        llm: the wrapped model, for `llm.precompute` and the like.

    Raises:
        PromptError: there is no tokenizer, or a batch_size above 1.
    """

    _load_tokenizer: Any = True
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        store: str | Store | None = None,
        policy: str | Policy = DEFAULT_POLICY,
        tenant: str = "",
        calibration: Calibration | str | Path | None = None,
        instruction: str = INSTRUCTION,
        **options: Any,
    ) -> None:
        if tokenizer is None:
            raise PromptError(f"{TASK} has no tokenizer; pass tokenizer=, the model's own")
        _check_batch_size(options.get("batch_size"))
        super().__init__(model, tokenizer, **options)  # brings the model to its device
        self.llm = wrap(
            self.model,
            tokenizer,
            store=store,
            policy=policy,
            tenant=tenant,
            instruction=instruction,
            calibration=calibration,
        )

    def __call__(
        self, inputs: Any, *args: Any, num_workers: int | None = None, batch_size: int | None = None, **options: Any
    ) -> Any:
        """Answer inputs; see the class.

        Raises:
            PromptError: an input has no question or no chunks, or they are not text, or batch_size is above 1.
            ContextLengthError: prompt and answer do not fit the model's context.
            PolicyError: the policy is unknown.
        """
        _check_batch_size(batch_size)
        if isinstance(inputs, list) and not inputs:  # transformers looks at the first
            return []
        return super().__call__(inputs, *args, num_workers=num_workers, **options)  # type: ignore[no-untyped-call]

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Divide options into those of `preprocess`, of `generate()` and of `postprocess`."""
        system = {"system": options.pop("system")} if "system" in options else {}
        return system, options, {}

    def preprocess(self, input_: Any, **options: Any) -> dict[str, Any]:
        """Return an input as keywords of `llm.generate`; `system` is for one that has none."""
        if not isinstance(input_, Mapping):
            raise PromptError(
                f'an input is a {type(input_).__name__}; pass {{"question": "...", "chunks": ["...", ...]}}'
            )
        for field in ("question", "chunks"):
            if field not in input_:
                raise PromptError(f'an input has no "{field}", only {sorted(map(str, input_))}; pass it')
        question, chunks, system = input_["question"], input_["chunks"], input_.get("system", options.get("system"))
        if not isinstance(question, str):
            raise PromptError(f'"question" is a {type(question).__name__}; pass one string')
        if not isinstance(chunks, list | tuple):
            raise PromptError(f'"chunks" is a {type(chunks).__name__}; pass a list of strings')
        for index, chunk in enumerate(chunks):
            if not isinstance(chunk, str) or not chunk.strip():
                kind = "an empty string" if isinstance(chunk, str) else f"a {type(chunk).__name__}"
                raise PromptError(f'"chunks" has {kind} at index {index}; pass strings with text in them')
        if system is not None and not isinstance(system, str):
            raise PromptError(f'"system" is a {type(system).__name__}; pass one string, or leave it out')
        return {"question": question, "chunks": list(chunks), "system": system}

    def _forward(self, input_tensors: dict[str, Any], **options: Any) -> Any:
        return self.llm.generate(**input_tensors, **options)

    def postprocess(self, model_outputs: Any, **_: Any) -> Answer:
        """Return an answer, a `Generation`, as transformers' text pipelines do."""
        generation: Generation = model_outputs
        return Answer(generated_text=generation.text, ttft_s=generation.ttft_s, stats=generation.stats.as_dict())


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and batch_size != 1:
        raise PromptError(
            f"batch_size={batch_size}: chunkcache serves one sequence at a time; leave it out, and pass a list"
        )


PIPELINE_REGISTRY.register_pipeline(TASK, ChunkCacheRagPipeline, pt_model=AutoModelForCausalLM, type="text")
# With it, save_pretrained would copy this file beside the model and ask whoever loads that for trust_remote_code.
delattr(ChunkCacheRagPipeline, "_registered_impl")
