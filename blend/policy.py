"""The interface of a policy, and the strings that name one.

A policy decides which reused tokens are recomputed, and from which layer on. It is one frozen dataclass in
one file; its fields are its options. `link:k=8` is parsed from nothing but those fields.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.errors import PolicyError


@dataclass(frozen=True)
class Policy(ABC):
    """Chooses the tokens of a plan to recompute.

    Class attributes:
        name: what it is called in a policy string.
        reuses: False if nothing stored is used at all.
        remembers: True if chunks are stored as they came out in their context, for exact reuse later.
    """

    name: ClassVar[str]
    reuses: ClassVar[bool] = True
    remembers: ClassVar[bool] = False

    @abstractmethod
    def select(self, plan: Plan) -> Tensor:
        """Return the sorted positions `[n]` out of `plan.inexact` that are recomputed from layer 0 on."""

    def scout_layers(self, layers: int) -> Sequence[int]:
        """Layers, of `layers`, whose question attention `select_seen` wants; empty for a policy that wants none."""
        return ()

    def pool(self, weights: Tensor) -> Tensor:
        """Reduce one layer's attention weights `[heads, question rows, tokens]` to a score `[tokens]`."""
        return weights.mean(dim=(0, 1))

    def select_seen(self, plan: Plan, attention: Tensor) -> Tensor:
        """Like `select`, for a policy with scout layers, which is asked this instead.

        Args:
            plan: what is reused.
            attention: `[scout layers, tokens]`, what each token gets from the question, pooled by `pool`.
        """
        raise NotImplementedError(f"{type(self).__name__} has scout layers but no select_seen()")

    @property
    def check_layers(self) -> frozenset[int]:
        """Layers before which `narrow` is asked; empty for a policy that decides before layer 0."""
        return frozenset()

    def narrow(self, plan: Plan, rows: Tensor, fresh: Tensor, stored: Tensor) -> Tensor:
        """At a check layer, choose which rows go on; the layers above recompute only these.

        Args:
            plan: what is reused.
            rows: sorted positions `[rows]` computed up to here.
            fresh: `[2, kv_heads, rows, head_dim]`, keys and values just computed for `rows` at this layer.
            stored: the reused ones in their place, same shape (unspecified where nothing is reused).

        Returns:
            Sorted indices `[n]` into `rows`, with all rows that are not in `plan.inexact` among them.
        """
        raise NotImplementedError(f"{type(self).__name__} has check layers but no narrow()")

    def __str__(self) -> str:
        options = ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return f"{self.name}:{options}" if options else self.name


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
    for part in re.split(r",(?=\s*\w+\s*=)", tail) if tail else []:
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if option not in known:
            takes = ", ".join(f"{field}={known[field].default}" for field in known) or "no options"
            raise PolicyError(f"policy {name!r} has no option {option!r}; it takes {takes} (in {text!r})")
        if not equals or option in options:
            fault = "is given twice" if equals else f"needs a value, as in {option}={known[option].default}"
            raise PolicyError(f"option {option!r} {fault} (in policy {text!r})")
        options[option] = _convert(known[option], value, text)
    return policy(**options)


def _convert(field: Field[Any], value: str, text: str) -> Any:
    kind: Any = type(field.default)
    try:
        return kind(value)
    except ValueError:
        raise PolicyError(f"{field.name}={value!r} is not a valid {kind.__name__} (in policy {text!r})") from None
