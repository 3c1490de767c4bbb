"""Policy strings: every policy comes back from its own string, and every mistake is named with its way out."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.blend import POLICIES, Plan, Policy, parse_policy
from chunkcache.blend.cacheblend import CacheBlend
from chunkcache.blend.full import Full
from chunkcache.blend.link import Link
from chunkcache.blend.policy import Check
from chunkcache.blend.policy import parse_policy as parse_among
from chunkcache.errors import InputError, PolicyError

OPTIONS = {
    "k": st.integers(0, 10**6),
    "ratio": st.floats(0, 1),
    "layer": st.integers(1, 200),
    "score": st.sampled_from(["k", "v", "kv"]),
    "gradual": st.just(()),
    "alpha": st.just("auto") | st.floats(0, 5),
    "focus": st.floats(0, 1),
    "stable": st.integers(1, 5),
    "lead": st.integers(0, 5000),
    "guard": st.none() | st.floats(1e-6, 10),
    "layers": st.sampled_from([(), (0.5, 0.75), (0.0, 1.0)]),
    "most": st.none() | st.floats(0, 1),
    "least": st.none() | st.integers(0, 10**6),
    "words": st.none() | st.integers(0, 1000),
    "window": st.none() | st.integers(0, 5000),
    "depth": st.sampled_from([(), (0.25, 0.5), (1.0, 1.0)]),
    "later": st.none() | st.floats(0, 1),
    "probes": st.sampled_from(["top", "even"]),
    "fusionrag.lead": st.sampled_from(["neighbours", "none"]),
}  # by an option's name, or by its policy's and its own

every_kind = pytest.mark.parametrize("kind", POLICIES.values(), ids=POLICIES)


@st.composite
def policies(draw):
    kind = draw(st.sampled_from(list(POLICIES.values())))
    names = [field.name for field in fields(kind)]
    return kind(**{name: draw(OPTIONS.get(f"{kind.name}.{name}", OPTIONS.get(name))) for name in names})


@given(policies())
def test_a_policy_comes_back_from_its_own_string(policy):
    assert parse_policy(str(policy)) == policy


@every_kind
def test_a_name_alone_means_the_defaults(kind):
    assert parse_policy(kind.name) == parse_policy(f"{kind.name}:") == kind()


@every_kind
def test_a_policy_cannot_be_changed_and_serves_as_a_key(kind):
    assert {kind(): 1}[kind()] == 1
    with pytest.raises(FrozenInstanceError):
        kind().name = "other"


@every_kind
def test_a_policy_has_a_docstring_and_is_found_under_its_name(kind):
    assert kind.__doc__
    assert POLICIES[kind.name] is kind


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("link:k=16", Link(k=16)),
        (" link:k = 16 ", Link(k=16)),
        ("cacheblend:ratio=0.2", CacheBlend(ratio=0.2)),
        ("cacheblend:layer=3, ratio=1", CacheBlend(ratio=1.0, layer=3)),
        ("cacheblend:ratio=1e-3", CacheBlend(ratio=0.001)),
    ],
)
def test_options_are_read_in_any_order_and_with_spaces(text, policy):
    assert parse_policy(text) == policy


def test_a_policy_is_returned_as_it_is():
    policy = Link(k=3)
    assert parse_policy(policy) is policy


def test_the_string_names_every_option():
    assert str(Full()) == "full"
    assert str(Link()) == "link:k=8"
    assert str(CacheBlend()) == "cacheblend:ratio=0.15,layer=1,score=v"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", rf"no policy is called ''; the known ones are {', '.join(POLICIES)}"),
        ("lnik:k=8", r"no policy is called 'lnik'; the known ones are full, "),
        ("LINK", r"no policy is called 'LINK'"),
        ("link:n=8", r"policy 'link' has no option 'n'; it takes k=8 \(in 'link:n=8'\)"),
        ("link:8", r"policy 'link' has no option '8'; it takes k=8"),
        ("cacheblend:ratio=0.1,k=2", r"'cacheblend' has no option 'k'; it takes ratio, layer=1"),
        ("full:k=8", r"policy 'full' has no option 'k'; it takes no options"),
        ("link:k=eight", r"k='eight' is not a valid int \(in policy 'link:k=eight'\)"),
        ("link:k=", r"k='' is not a valid int"),
        ("link:k=8.5", r"k='8\.5' is not a valid int"),
        ("link:k=8,", r"k='8,' is not a valid int"),
        ("cacheblend:ratio=15%", r"ratio='15%' is not a valid float"),
        ("link:k=-1", r"k=-1 is negative; link recomputes the first k tokens"),
        ("cacheblend:ratio=15", r"ratio=15\.0 is not between 0 and 1"),
        ("cacheblend:ratio=-0.1", r"ratio=-0\.1 is not between 0 and 1"),
        ("cacheblend:ratio=nan", r"ratio=nan is not between 0 and 1"),
        ("cacheblend:layer=0", r"layer=0 is below 1: stored KV of layer 0 never deviate"),
    ],
)
def test_every_mistake_is_named_with_the_way_out(text, message):
    with pytest.raises(PolicyError, match=message) as caught:
        parse_policy(text)
    assert isinstance(caught.value, InputError)
    assert caught.value.__cause__ is None


def test_an_option_without_a_value_is_told_from_an_unknown_one():
    with pytest.raises(PolicyError, match=r"'k' needs a value"):
        parse_policy("link:k")


def test_an_option_given_twice_is_refused():
    with pytest.raises(PolicyError, match=r"'k' is given twice"):
        parse_policy("link:k=8,k=16")


@dataclass(frozen=True)
class Listed(Policy):
    """A policy of one's own, with an option that holds commas, and a check layer."""

    name: ClassVar[str] = "listed"
    layers: str = ""

    def select(self, plan):
        return plan.inexact


def test_a_value_may_hold_commas():
    assert parse_among("listed:layers=1,2,3", {"listed": Listed}).layers == "1,2,3"


def test_a_policy_without_check_layers_is_never_asked_to_narrow():
    assert list(Listed().filter_layers(30)) == list(Listed().watched_layers(30)) == []
    with pytest.raises(NotImplementedError, match=r"Listed has check layers but no filter_rows\(\)"):
        Listed().filter_rows(Check(Plan.of([1, 2]), 1, 2, torch.tensor([0]), [], list))


def test_an_infinite_ratio_is_refused():
    with pytest.raises(PolicyError, match="ratio=inf"):
        CacheBlend(ratio=math.inf)
