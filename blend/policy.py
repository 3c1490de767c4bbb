"""The interface of a policy, and the strings that name one.

A policy decides which reused tokens are recomputed, and up to which layer. It is one frozen dataclass in one
file; its fields are its options. `link:k=8` is parsed from nothing but those fields.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, Literal

from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.shift import Shift
from chunkcache.errors import PolicyError
from chunkcache.kv import ContextAttention

Share = float | Literal["auto"]  # a share of the chunk tokens, or found out per request
Schedule = tuple[float, ...]


@dataclass(frozen=True)
class Check:
    """What a policy can look at before a layer, to choose which rows go on.

    Attributes:
        plan: what is reused.
        layer: the layer that comes next.
        layers: how many the model has.
        rows: sorted positions `[rows]` computed up to here.
        attention: what each token got from the question in the layers watched so far, `[tokens]` each, as
            pooled by the policy's `pool`.
        kv: computes this layer's keys and values of `rows`, and returns them with the reused ones in their
            place, each `[2, kv_heads, rows, head_dim]` (unspecified where nothing is reused).
        host_rows: returns `rows` on the CPU, mostly without a wait; None for `rows.cpu()`.
    """

    plan: Plan
    layer: int
    layers: int
    rows: Tensor
    attention: Sequence[Tensor]
    kv: Callable[[], tuple[Tensor, Tensor]]
    host_rows: Callable[[], Tensor] | None = None

    def rows_on_host(self) -> Tensor:
        """Return `rows` on the CPU."""
        return self.rows.cpu() if self.host_rows is None else self.host_rows()


@dataclass(frozen=True)
class Policy(ABC):
    """Chooses the tokens of a plan to recompute.

    Class attributes:
        name: what it is called in a policy string.
        reuses: False if nothing stored is used at all.
        stores_in_context: True if chunks are stored as they came out in their context, for exact reuse later.
        lossless: True if KV that a codec has rounded are not used.
        versioned: True if chunks have versions of several contexts, and `overhead` says which to use.
        skips_windows: True if a scout looks in layers that see the whole prompt only; see `Decoder.seeing_all`.
    """

    name: ClassVar[str]
    reuses: ClassVar[bool] = True
    stores_in_context: ClassVar[bool] = False
    lossless: ClassVar[bool] = False
    versioned: ClassVar[bool] = False
    skips_windows: ClassVar[bool] = False

    @abstractmethod
    def select(self, plan: Plan) -> Tensor:
        """Return the sorted positions `[n]` out of `plan.inexact` that are recomputed from layer 0 on."""

    def lead_in(self) -> int:
        """Return how many tokens of lead-in the chunks were computed behind that this policy reuses."""
        return 0

    def neighbours(self) -> bool:
        """Return whether chunks are wanted as computed behind their nearest chunks, where they are stored so."""
        return False

    def shift(self) -> Shift | None:
        """Return how rows that are not recomputed are corrected by those that are (`blend.shift`); None for not."""
        return None

    def afterwards(self) -> float:
        """Return the share of the chunk tokens that is recomputed once the first token is out (`blend.later`)."""
        return 0.0

    def layers_watched_for_later(self, layers: int) -> Sequence[int]:
        """Layers, of `layers`, whose question attention in the prefill says what is recomputed afterwards."""
        return ()

    def at_once(self) -> Policy:
        """Return this policy without what it leaves for later, for where that cannot be had."""
        return self

    def guarded(self) -> float | None:
        """Return the bound of the fidelity guard, KL of the first token in nats; None without a guard."""
        return None

    def escalation(self) -> Sequence[Policy]:
        """Return the steps of a guarded prefill: policies with the same scout layers that select more and more."""
        return [self]

    def wants_attention(self, plan: Plan) -> bool:
        """Return whether a policy with scout layers wants to look at this plan; else it is asked to `select`."""
        return True

    def attention_layers(self, layers: int) -> Sequence[int]:
        """Layers, of `layers`, whose question attention `select_by_attention` wants; empty for none."""
        return ()

    def carries(self) -> bool:
        """Return whether a prefill goes on with the question from where the scout layers end; see `CarriedRows`."""
        return False

    def blind(self) -> bool:
        """Return whether the question is run without sight of any chunk, up to the layers that it looks at."""
        return False

    def pool(self, weights: Tensor) -> Tensor:
        """Reduce one layer's attention weights `[heads, question rows, tokens]` to a score `[tokens]`."""
        return weights.mean(dim=(0, 1))

    def select_by_attention(self, plan: Plan, attention: Tensor) -> Tensor:
        """Like `select`, for a policy with scout layers, which is asked this instead.

        Args:
            plan: what is reused.
            attention: `[scout layers, tokens]`, what each token gets from the question, pooled by `pool`.
        """
        raise NotImplementedError(f"{type(self).__name__} has scout layers but no select_by_attention()")

    def filter_layers(self, layers: int) -> Sequence[int]:
        """Layers, of `layers`, before which `filter_rows` is asked; empty for one that decides before layer 0."""
        return ()

    def watched_layers(self, layers: int) -> Sequence[int]:
        """Layers, of `layers`, whose question attention `filter_rows` wants to have seen."""
        return ()

    def overhead(self, context: ContextAttention | None, before: Sequence[str]) -> float:
        """Return the share of a stored chunk to recompute behind the chunks `before`; None was computed alone."""
        raise NotImplementedError(f"{type(self).__name__} is versioned but has no overhead()")

    def filter_rows(self, check: Check) -> Tensor | None:
        """Before a check layer, choose which rows go on; this layer and those above recompute only these.

        Returns:
            sorted indices `[n]` into `check.rows`, with all rows that are not in `plan.inexact` among them, on their
            device or the CPU; None if all go on.
        """
        raise NotImplementedError(f"{type(self).__name__} has check layers but no filter_rows()")

    def __str__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        options = ",".join(f"{name}={_text(value)}" for name, value in values if value not in ((), None))
        return f"{self.name}:{options}" if options else self.name


def highest(candidates: Tensor, scores: Tensor, ratio: float) -> Tensor:
    """Return the share `ratio` of `candidates` with the highest `scores` `[tokens]`, as sorted positions `[n]`.

    Args:
        candidates: positions `[m]`, mostly `plan.inexact_on(scores.device)`.
        scores: of all tokens, on the same device.
        ratio: at most 1.
    """
    count = math.ceil(ratio * len(candidates))
    return candidates[scores[candidates].topk(count).indices].cpu().sort().values


def check_share(name: str, value: Share | None, hint: str = "") -> None:
    """Raise PolicyError unless `value` is a share, 0 to 1, or "auto"."""
    if value != "auto" and not 0 <= (math.nan if value is None else value) <= 1:
        raise PolicyError(f"{name}={value} is not between 0 and 1{hint}")


def parse_policy(text: str | Policy, policies: Mapping[str, type[Policy]]) -> Policy:
    """Return the policy that a string such as `cacheblend:ratio=0.15` names.

    Raises:
        PolicyError: the name or an option is unknown, or a value is malformed or out of range.
    """
    if isinstance(text, Policy):
        return text
    name, _, tail = text.strip().partition(":")
    if name not in policies:
        raise PolicyError(f"no policy is called {name!r}; the known ones are {', '.join(policies)}")
    policy = policies[name]
    known = {field.name: field for field in fields(policy)}
    options: dict[str, Any] = {}
    for part in re.split(r",(?=\s*[a-z_]+\s*=)", tail) if tail else []:
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if option not in known:
            takes = ", ".join(map(_example, known.values())) or "no options"
            raise PolicyError(f"policy {name!r} has no option {option!r}; it takes {takes} (in {text!r})")
        if not equals or option in options:
            fault = "is given twice" if equals else f"needs a value, as in {_example(known[option])}"
            raise PolicyError(f"option {option!r} {fault} (in policy {text!r})")
        options[option] = _convert(known[option], value, text)
    return policy(**options)


def _example(field: Field[Any]) -> str:
    return field.name if field.default is None else f"{field.name}={_text(field.default)}"


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _share(value: str) -> Share:
    return "auto" if value == "auto" else float(value)


def _schedule(value: str) -> Schedule:
    return tuple(float(part) for part in value.split(","))


_KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "int"),
    "int | None": (int, "int"),
    "float": (float, "float"),
    "float | None": (float, "float"),
    "str": (str, "str"),
    "Share": (_share, "float, nor auto"),
    "Share | None": (_share, "float, nor auto"),
    "Schedule": (_schedule, "list of floats"),
}  # by annotation, which a dataclass keeps as text


def _convert(field: Field[Any], value: str, text: str) -> Any:
    convert, kind = _KINDS[str(field.type)]
    try:
        return convert(value)
    except ValueError:
        raise PolicyError(f"{field.name}={value!r} is not a valid {kind} (in policy {text!r})") from None
