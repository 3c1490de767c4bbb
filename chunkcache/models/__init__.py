"""Load a Hugging Face model and its tokenizer by one name.

A name is an alias (`chunkcache.models.packaged`), a folder written by `save_pretrained`, a `.gguf` file, or a Hugging
Face id, tried in that order; `./name` reaches a folder that shares its name with an alias. Remote code is never run.

A GGUF file is converted once, to `models/<stem>-<digest>-v<format>` in the cache folder, and from then on loads like
any other folder. The digest covers the file's whole content, so that one conversion serves
every copy of a file, and an edited file never meets its old conversion; nor does one that an older chunkcache made
in another way, whose folder has another format or none. Weights are saved in float32: they
come out of their blocks as such, and a narrower type would round them a second time. The tokenizer has the file's
pre-tokenizer, by `chunkcache.models.gguf`.

    $CHUNKCACHE_CACHE_DIR, or the platform's cache folder for chunkcache
    ├── joined/
    │   └── 9c1e…/gemma-3-270m-q4_k_m.gguf          the file of a model that comes in parts
    └── models/
        └── SmolLM2-135M-Instruct.Q4_1-3f2a…-v2/    config, safetensors and tokenizer; delete it to convert again
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.utils import (
    HFValidationError,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from chunkcache.errors import InputError, ModelNotFoundError, missing_extra
from chunkcache.kv.device import devices
from chunkcache.models.cache import cache_dir, digest_of, make_once
from chunkcache.models.gguf import check_pre_tokenizer, pre_tokenizer_name, read_once, restore_pre_tokenizer
from chunkcache.models.packaged import ALIASES, DEFAULT_MODEL

__all__ = ["ALIASES", "DEFAULT_MODEL", "DTYPES", "available_devices", "cache_dir", "load_model"]

log = logging.getLogger(__name__)

# from_pretrained swaps out a method of its model class for as long as it runs. Two threads that overlap there
# can leave weight tying switched off for good, which gives later models a random output layer.
_ONE_AT_A_TIME = threading.Lock()

_FORMAT = 2  # of a conversion: counted up whenever the same file comes to give another one

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    on_status: Callable[[str], None] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the causal language model and the tokenizer called `name`, in eval mode.

    `device` is one of `available_devices()`, the first of them by default. `dtype` is one of `DTYPES`; `auto`
    keeps the checkpoint's own type, which for a GGUF file is float32. A checkpoint that bitsandbytes or the like has
    quantised is loaded as it is. `on_status` is called with one line
    before each step that can take seconds.

    Raises `ModelNotFoundError` when nothing can be loaded under `name`, or a GGUF file names a pre-tokenizer that is
    not known here, and `InputError` for a device or a
    dtype that does not exist here, a cache folder that cannot be written, or a GGUF file without the packages of
    the extra `gguf`.
    """
    device = _check_device(device)
    if dtype not in DTYPES:
        raise InputError(f"Unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")

    def report(line: str) -> None:
        log.info(line)
        if on_status is not None:
            on_status(line)

    with _ONE_AT_A_TIME, _quiet():
        source = _locate(name, report)
        report(f"loading {name} on {device}")
        placed = _placed(name, source, device)
        model, tokenizer = _from_pretrained(name, source, dtype=dtype, **placed)
    if not placed:
        model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its types
    return model, tokenizer


def available_devices() -> list[str]:
    """Names that `load_model` takes as `device` on this machine, the fastest first."""
    return devices()


def _check_device(device: str | None) -> str:
    devices = available_devices()
    if device is None:
        return devices[0]
    if device not in devices:
        raise InputError(f"No device {device!r} on this machine: choose one of {', '.join(devices)}.")
    return device


def _placed(name: str, source: str, device: str) -> dict[str, Any]:
    """What tells `from_pretrained` where the weights go; nothing where the model is moved there afterwards.

    A quantised model is made on its device and cannot be moved. Others go straight to an accelerator, without all of
    their weights in memory first, where the package for that is installed.
    """
    with _failure_named("model", name, source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    quantised = getattr(config, "quantization_config", None) is not None
    straight = device != "cpu" and importlib.util.find_spec("accelerate") is not None
    return {"device_map": {"": device}} if quantised or straight else {}


def _locate(name: str, report: Callable[[str], None]) -> str:
    """What `from_pretrained` takes for `name`: a folder, if need be a converted one, or a Hugging Face id."""
    path = ALIASES[name].path(report) if name in ALIASES else Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise _not_found(name, "there is no such file")
        return str(_converted(name, path, report))
    if name and path.is_dir():
        return str(path)
    if path.exists():
        raise _not_found(name, "it is neither a folder nor a .gguf file")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise _not_found(name, "there is no such folder, and it is not a Hugging Face id") from error
    report(f"looking for {name} on the Hugging Face Hub")
    return name


def _converted(name: str, gguf: Path, report: Callable[[str], None]) -> Path:
    """Folder with the converted model of a GGUF file, made at the first call."""
    with _failure_named("file", name, str(gguf)):
        digest = digest_of([gguf])
    folder = cache_dir() / "models" / f"{gguf.stem}-{digest}-v{_FORMAT}"
    if folder.is_dir():
        return folder
    _check_gguf_packages(gguf)
    report(f"converting {gguf.name} to {folder}, once")
    make_once(folder, "converted model", lambda whole: _convert(name, gguf, whole))
    return folder


def _check_gguf_packages(gguf: Path) -> None:
    """Import what transformers reads a GGUF file with; its own error would not name the extra."""
    for package in ("gguf", "accelerate"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise missing_extra("gguf", f"reading {str(gguf)!r}", error) from error


def _convert(name: str, gguf: Path, folder: Path) -> None:
    with read_once(), _no_gguf_bar():
        with _failure_named("tokenizer", name, str(gguf)):
            pre_tokenizer = pre_tokenizer_name(gguf)
        if pre_tokenizer is not None:
            check_pre_tokenizer(pre_tokenizer, gguf)
        model, tokenizer = _from_pretrained(
            name,
            str(gguf.parent),
            gguf_file=gguf.name,
            tokenizer_class=AutoTokenizer if pre_tokenizer is None else PreTrainedTokenizerFast,
            dtype="float32",
            # With GGUF kernels installed the weights would stay in their blocks and could not be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
    if pre_tokenizer is not None:
        restore_pre_tokenizer(tokenizer.backend_tokenizer, pre_tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_pretrained(
    name: str, source: str, *, gguf_file: str | None = None, tokenizer_class: Any = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # Left unset, transformers would ask on the terminal whether to run code that comes with the model.
    common = {"gguf_file": gguf_file, "trust_remote_code": False}
    with _failure_named("model", name, source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **common, **options)
    with _failure_named("tokenizer", name, source):
        tokenizer = (tokenizer_class or _tokenizer_class(source)).from_pretrained(source, **common)
    model, info = loaded
    if info["missing_keys"]:
        raise _not_found(name, f"its weights lack {', '.join(sorted(info['missing_keys'])[:3])}")
    return model, tokenizer


def _tokenizer_class(source: str) -> Any:
    """What reads the tokenizer of `source`: of the conversion of a byte-level BPE, a class that takes it as it is.

    For some models AutoTokenizer takes a class that puts a pre-tokenizer of its own in place of the file's.
    """
    if cache_dir() not in Path(source).parents:
        return AutoTokenizer
    config = json.loads(Path(source, "tokenizer_config.json").read_text(encoding="utf-8"))
    as_it_is = config.get("tokenizer_class") == PreTrainedTokenizerFast.__name__
    return PreTrainedTokenizerFast if as_it_is else AutoTokenizer


@contextmanager
def _failure_named(part: str, name: str, source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # A damaged file can fail in any way at all while it is parsed, from struct.error to KeyError.
        first_line = str(error).strip().partition("\n")[0].rstrip(".")
        reason = f"{part}: {first_line or repr(error)}"
        if cache_dir() in Path(source).parents:
            reason += f"; delete {source} to convert it again"
        raise _not_found(name, reason) from error


def _not_found(name: str, reason: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"No model can be loaded from {name!r} ({reason}). Give an alias ({', '.join(ALIASES)}), "
        "a folder written by save_pretrained, a .gguf file, or a Hugging Face id; an id needs the network or "
        "an earlier download, and a gated or private one needs HF_TOKEN."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the log and the progress bars of transformers and huggingface_hub, then restore both."""
    loggers = [logging.getLogger("transformers"), logging.getLogger("huggingface_hub")]
    levels = [logger.level for logger in loggers]
    shown, hub_shown = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # the hub's too, and likewise below
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
        if hub_shown and not shown:
            enable_progress_bars()
        elif shown and not hub_shown:
            disable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _no_gguf_bar() -> Iterator[None]:
    """Hold back the bar of transformers' GGUF reader, which obeys neither library's switch."""
    reader: Any = modeling_gguf_pytorch_utils
    shown = getattr(reader, "tqdm", None)
    if shown is None:  # a transformers whose reader has no such bar
        yield
        return
    reader.tqdm = partial(shown, disable=True)  # the reader's own name: nobody else's bars
    try:
        yield
    finally:
        reader.tqdm = shown
