"""What `chunkcache calibrate` found for one model: read by the policies that depend on it.

A calibration is a small JSON file, by default in the cache folder under the model's fingerprint, where every
process that wraps the same model finds it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from chunkcache.blend.guard import GuardModel
from chunkcache.blend.query import Look
from chunkcache.errors import CalibrationError, PolicyError

GUARD_REPORT = ("guarded", "guard", "climbed")  # what a report says of a guard


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        fingerprint: of the model it was found for.
        alpha: Cache-Craft's alpha, None if it was not looked for.
        guard: predicts the error of a guarded prefill, None if it was not looked for.
        report: how it was found and how well it does, for people.
        lead: tokens of lead-in that chunks are best computed behind, None if it was not looked for.
        look: how `query` looks at a question, None if it was not looked for.
    """

    fingerprint: str
    alpha: float | None = None
    guard: GuardModel | None = None
    report: dict[str, Any] = field(default_factory=dict)
    lead: int | None = None
    look: Look | None = None

    def over(self, earlier: Calibration | None) -> Calibration:
        """Return this calibration, with what it did not look for taken from an earlier one of the same model.

        A guard is not taken over that was fitted to another lead-in or another way to look.
        """
        if earlier is None:
            return self
        alpha = earlier.alpha if self.alpha is None else self.alpha
        lead = earlier.lead if self.lead is None else self.lead
        look = self.look or earlier.look
        told, guard = earlier.report, self.guard
        if guard is None and (lead, look) == (earlier.lead, earlier.look):
            guard = earlier.guard
        elif guard is None:
            told = {name: value for name, value in told.items() if name not in GUARD_REPORT}
        report = {**told, **self.report}
        return replace(self, alpha=alpha, guard=guard, lead=lead, look=look, report=report)

    def save(self, path: Path | None = None) -> Path:
        """Write it to `path`, or to its place in the cache folder; return where."""
        path = default_path(self.fingerprint) if path is None else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
        return path


def default_path(fingerprint: str) -> Path:
    """Return where the calibration of a model is looked for."""
    from chunkcache.models import cache_dir  # with transformers' modelling code, which takes seconds

    return cache_dir() / "calibrations" / f"{fingerprint[:16]}.json"


def load_calibration(fingerprint: str, path: Path | None = None) -> Calibration | None:
    """Return the calibration of a model, or None if there is none in its place.

    Raises:
        CalibrationError: `path` is given and there is none, or the file is damaged or another model's.
    """
    place = default_path(fingerprint) if path is None else path
    if path is None and not place.exists():
        return None
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
        alpha = None if data["alpha"] is None else _number(data["alpha"])
        guard = None if data["guard"] is None else _guard(**data["guard"])
        lead = None if data.get("lead") is None else int(_number(data["lead"]))  # older ones have none
        if lead is not None and lead < 0:
            raise ValueError(f"a lead-in of {lead} tokens")
        look = None if data.get("look") is None else _look(**data["look"])
        found = Calibration(str(data["fingerprint"]), alpha, guard, dict(data["report"]), lead, look)
    except (OSError, ValueError, KeyError, TypeError, PolicyError) as error:
        raise CalibrationError(f"{place} is no calibration ({error!r}); run chunkcache calibrate again") from None
    if found.fingerprint != fingerprint:
        raise CalibrationError(f"{place} was made for another model; run chunkcache calibrate for this one")
    return found


def _guard(weights: list[list[float]], margins: list[list[float]]) -> GuardModel:
    rows = [[tuple(map(_number, row)) for row in table] for table in (weights, margins)]
    if not all(rows) or any(len(row) != 2 for row in rows[1]):
        raise ValueError("its guard is not complete")
    return GuardModel(tuple(rows[0]), tuple((bound, margin) for bound, margin in rows[1]))


def _look(first: float, last: float, most: float, least: float, words: float = Look.words) -> Look:
    return Look(_number(first), _number(last), _number(most), int(_number(least)), int(_number(words)))


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)
