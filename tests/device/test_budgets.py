"""What a request costs on an accelerator, counted: kernel launches, and waits of the host for the device.

Both are what a GPU is slow by with prompts of this size. Neither may depend on how many chunks there are, nor may
anything be waited for inside a layer. The last wait of each is for the logits, without which there is no first token.
"""

from __future__ import annotations

import pytest
import torch
from pretend import PretendDevice
from support.device import cost, texts, wrapped
from support.llm import QUESTION

BUDGETS = {  # launches beside the model's layers, launches a layer (a scout passes two thirds of them first), waits
    "full": (30, 40, 2),
    "prefix": (30, 42, 2),
    "reuse": (50, 42, 2),
    "link:k=8": (50, 42, 2),
    "cacheblend:ratio=0.15": (110, 42, 2),
    "cacheblend:ratio=0.2,gradual=0.3,0.1": (160, 42, 2),
    "kvshift": (120, 62, 3),
    "prophetkv": (60, 92, 3),
    "fusionrag": (90, 92, 3),
    "query:ratio=0.05": (60, 74, 3),
    "cachecraft": (120, 58, 8),  # one wait for each of its six looks at the focus
}
DEQUANTISED = (40, 6)  # launches that int8 adds: in all, and in a layer


def costs(store, layers, counts, policies=tuple(BUDGETS)):
    """Return what each policy costs, by policy and number of chunks."""
    with PretendDevice() as device:
        llm = wrapped("cuda:0", store, layers=layers, dtype=torch.bfloat16)
        found = {(policy, count): cost(device, llm, policy, count) for policy in policies for count in counts}
        llm.store.close()
        assert not device.total.violations, device.total.violations
    return found


@pytest.mark.parametrize(
    ("store", "policies", "more"),
    [
        ("device://", tuple(BUDGETS), (0, 0)),
        ("memory://?codec=int8", ("link:k=8", "query:ratio=0.05"), DEQUANTISED),
    ],
)
def test_launches_and_waits_stay_in_their_budgets_and_do_not_grow_with_the_chunks(store, policies, more):
    layers = 6
    found = costs(store, layers, (2, 7), policies)
    for policy in policies:
        constant, each, waits = BUDGETS[policy]
        few, many = found[policy, 2], found[policy, 7]
        assert few.launches <= constant + more[0] + (each + more[1]) * layers, few.table()
        assert few.syncs <= waits, few.table()
        assert many.syncs <= waits, many.table()
        if policy != "cachecraft":  # how often it narrows depends on what it sees
            assert many.launches == few.launches, many.table()


def test_waits_do_not_grow_with_the_layers():
    policies = ["link:k=8", "cacheblend:ratio=0.15", "query:ratio=0.05", "cachecraft"]
    found = costs("memory://", 16, (3,), policies)
    for policy in policies:
        assert found[policy, 3].syncs <= BUDGETS[policy][2], found[policy, 3].table()


@pytest.mark.parametrize(
    ("store", "counts", "limit"), [("device://", (17,), 2300), ("memory://?codec=int8", (17,), 2500)]
)
def test_query_on_a_model_of_32_layers(store, counts, limit):
    """The plain model takes 1,301 launches, and the scout another 813."""
    found = costs(store, 32, counts, ["query:ratio=0.05"])
    for seen in found.values():
        assert seen.launches <= limit, seen.table()
        assert seen.syncs <= 3, seen.table()


def test_ids_and_rotations_are_copied_to_the_device_once():
    found = costs("device://", 4, (4, 8), ["reuse"])
    for seen in found.values():
        assert seen.copies == {"H2D pageable": 4}, seen.table()  # ids, rows, angles and whose they are


def test_nothing_of_ours_waits_on_the_way_to_an_answer():
    with PretendDevice() as device:
        llm = wrapped("cuda:0", "device://", layers=4)
        llm.precompute(texts(4), policy="link:k=4")
        with device.watch() as seen:
            llm.generate(QUESTION, texts(4), policy="link:k=4", max_new_tokens=1)
        llm.store.close()
    places = {where.split(":")[0] for _, where in seen.sync_lines if not where.endswith(" generate")}  # transformers'
    assert places <= {"library/sentinel.py", "engine/generation.py", "engine/engine.py"}, seen.table()
