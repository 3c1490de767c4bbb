"""How near the self-check of a valid model comes to refusing it, by dtype, with the kernels of this device."""

from __future__ import annotations

from typing import Any

import torch

from chunkcache.blend import Decoder, self_check
from chunkcache.errors import SelfCheckError
from chunkcache.eval.gpu.check import Check
from chunkcache.eval.gpu.exactness import STD
from chunkcache.eval.gpu.made import make_model

TABLE = "Self-check, relative errors"


def selfcheck(check: Check) -> None:
    """Run the self-check of small models in each dtype, and of the main one."""
    small = "toy" if check.options.smoke else "small"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype == torch.float16 and not check.cuda:
            continue
        _figures(check, small, dtype, make_model(small, dtype, check.device, STD if small == "toy" else 0.04))
    if not check.has(20, "self-check of the main model"):
        return
    if not _figures(check, "main", check.dtype, check.model()) and check.dtype == torch.bfloat16:
        check.report.say("the main model is float16 from here on")
        check.change_dtype(torch.float16)


def _figures(check: Check, name: str, dtype: torch.dtype, model: Any) -> bool:
    """Return whether the model passes; note its figures."""
    kind = str(dtype).removeprefix("torch.")
    try:
        found = self_check(Decoder(model)).as_dict()
    except SelfCheckError as error:
        check.report.add_wrong(f"the self-check refuses a valid model ({name}, {kind}): {error}")
        return False
    figures = {key: value for key, value in found.items() if isinstance(value, float)}
    check.report.row(TABLE, model=name, dtype=kind, **figures)
    return True
