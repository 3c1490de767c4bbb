"""Peers: the talk with a worker process, what goes wrong in it, and the set-up of environments.

The workers of transformers run here under the tests' own Python. Those of kvboost and llama.cpp need their own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pip
import pytest
import torch
from click.testing import CliRunner
from support.llm import QUESTION, TEXTS, chat_tokenizer, plain, saved_model, tiny_model, wrapped
from transformers import AutoModelForCausalLM

from chunkcache.errors import PeerError
from chunkcache.eval import Case
from chunkcache.eval.commands.peers import bench_peers
from chunkcache.eval.peers import PEERS, Build, Peer, environments, parts, peer_weights, setup_peers
from chunkcache.eval.peers.registry import PeerSpec
from chunkcache.eval.peers.weights import float32_gguf
from chunkcache.prompt.builder import PromptChunk

PYTHON = Path(sys.executable)
PREFIX = [5, 6, 7, 8]
PROMPT = [PREFIX, [9, 10, 11], [12, 13], [14, 15, 16]]
OTHER = [PREFIX, [12, 13], [14, 15, 16]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return Path(saved_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module", params=["transformers", "transformers-prefix"])
def running(request, model_folder):
    """A running peer, which takes seconds to start: whatever it was asked before, it answers the same."""
    with Peer.start(request.param, Path("nowhere"), model_folder, 1, python=PYTHON) as peer:
        yield peer


@pytest.fixture
def speaking(monkeypatch, tmp_path):
    """Return what starts a peer whose worker is a script of the test's own."""

    def start(script, kind=Peer, timeout_s=60.0):
        (tmp_path / "worker.py").write_text(f"import json, sys, time\n{script}")
        monkeypatch.setattr("chunkcache.eval.peers.client.HERE", tmp_path)
        return kind.run("transformers", PYTHON, [], tmp_path, 1, timeout_s)

    return start


LOADED = 'print(json.dumps({"ok": True, "versions": {}, "settings": {}}), flush=True)\nsys.stdin.readline()\n'


def replying(reply):
    """Return the script of a worker that loads, and answers the first question with this."""
    return f"sys.stdin.readline(); {LOADED}print({reply!r}, flush=True); time.sleep(1000)"


def test_answers_are_those_of_generate(running):
    model = tiny_model()
    assert running.versions["transformers"]
    assert running.settings["dtype"] == "float32"
    for prompt in (PROMPT, OTHER, PROMPT, [[*PREFIX[:2], 20], [9]], [[], [9, 10], [11]]):
        running.warm(prompt)
        for _ in range(2):
            answer = running.answer(prompt, 6)
            ids = torch.tensor([[token for part in prompt for token in part]])
            assert answer.token_ids == plain(model, ids, max_new_tokens=6, do_sample=False)
            assert answer.ttft_s > 0
            with torch.no_grad():
                torch.testing.assert_close(answer.logits, model(ids).logits[0, -1], rtol=1e-4, atol=1e-5)


def test_a_prompt_other_than_the_one_warmed_for_is_answered_right(running):
    model = tiny_model()
    running.warm(PROMPT)
    for prompt in ([PREFIX], [PREFIX[:3]], [PREFIX[:2], [30, 31]], [[40, 41]]):
        ids = torch.tensor([[token for part in prompt for token in part]])
        assert running.answer(prompt, 4).token_ids == plain(model, ids, max_new_tokens=4, do_sample=False)


def test_an_error_of_the_peer_is_told_and_it_goes_on(running):
    with pytest.raises(PeerError, match=rf"{running.name} could not do its part \(answer\): IndexError"):
        running.answer([[999_999]], 1)
    assert running.answer(PROMPT, 1).token_ids


def test_a_model_that_cannot_be_loaded_is_told(tmp_path):
    with pytest.raises(PeerError, match=r"transformers could not do its part \(load\)"):
        Peer.start("transformers", tmp_path, tmp_path / "none", 1, python=PYTHON)


def test_what_a_peer_prints_does_not_disturb_the_talk(tmp_path, monkeypatch):
    """The real worker, with a peer's class that prints."""
    (tmp_path / "noisy.py").write_text(
        "import os\n"
        "class Noisy:\n"
        "    packages = ()\n"
        "    def load(self, model, threads):\n"
        "        print('hello'); os.write(1, b'from C'); return {}\n"
    )
    monkeypatch.setitem(PEERS, "noisy", PeerSpec("noisy", "noisy:Noisy", ""))
    source = (Path(environments.__file__).parent / "worker.py").read_text()
    (tmp_path / "worker.py").write_text(source)
    monkeypatch.setattr("chunkcache.eval.peers.client.HERE", tmp_path)
    with Peer.start("noisy", tmp_path, tmp_path, 1, python=PYTHON) as peer:
        assert peer.settings == {}


def test_a_peer_that_dies_is_told_with_what_it_said(speaking):
    with pytest.raises(PeerError, match=r"(?s)transformers died with exit code 3.*out of luck"):
        speaking("sys.stdin.readline(); print('out of luck', file=sys.stderr); sys.exit(3)")


def test_a_peer_that_died_between_two_requests_is_told(speaking):
    with speaking(f"sys.stdin.readline(); {LOADED}") as peer:
        with pytest.raises(PeerError, match="died with exit code 0"):
            peer.warm(PROMPT)
        with pytest.raises(PeerError, match="has ended with exit code 0"):
            peer.warm(PROMPT)


def test_a_peer_that_hangs_is_ended(speaking):
    with pytest.raises(PeerError, match=r"did not answer within 0\.5 s"):
        speaking("time.sleep(1000)", timeout_s=0.5)


@pytest.mark.parametrize("line", ["no json", "[1]", ""])
def test_garbage_is_told(speaking, line):
    with pytest.raises(PeerError, match="answered what is no reply"):
        speaking(f"print({line!r}, flush=True); time.sleep(1000)")


@pytest.mark.parametrize("reply", ["{}", '{"ttft_s": 1, "answer": 3}', '{"ttft_s": 1, "answer": [1], "logits": "?"}'])
def test_an_answer_that_is_none_is_told(speaking, reply):
    with speaking(replying(reply)) as peer, pytest.raises(PeerError, match="answered what is no answer"):
        peer.answer(PROMPT, 1)


@pytest.mark.parametrize("reply", ["{}", '{"ttft_s": 1}'])
def test_a_prefill_of_another_build_that_lacks_something_is_told(speaking, reply):
    with speaking(replying(reply), Build) as build, pytest.raises(PeerError, match="what is no answer"):
        build.prefill(Case(QUESTION, TEXTS))


@pytest.mark.parametrize("reply", ['{"answer": [1]}', '{"answer": [1], "logits": "AAAAAAAAAAA="}'])  # 2 for 3 tokens
def test_logits_of_another_build_that_are_none_are_told(speaking, reply):
    with speaking(replying(reply), Build) as build, pytest.raises(PeerError, match="what is no answer"):
        build.judge([1, 2, 3], 4)


def test_an_unknown_peer_and_one_that_is_not_set_up_are_told(tmp_path):
    with pytest.raises(PeerError, match=r"no peer 'vllm'; the peers are transformers, "):
        Peer.start("vllm", tmp_path, tmp_path, 1)
    with pytest.raises(PeerError, match=r"kvboost is not in .* it is not set up; run `chunkcache bench peers --into"):
        Peer.start("kvboost", tmp_path, tmp_path, 1)
    (tmp_path / "kvboost.log").touch()
    with pytest.raises(PeerError, match=r"its set-up failed, see .*kvboost\.log"):
        Peer.start("kvboost", tmp_path, tmp_path, 1)


def test_parts_make_up_the_prompt():
    prompts = wrapped().prompts
    passages = [PromptChunk(TEXTS[0], joins_next=True), PromptChunk(TEXTS[1], skip_chars=10), TEXTS[2]]
    for chunks in (TEXTS, passages, ()):
        prompt = prompts.build(QUESTION, chunks)
        cut = parts(prompt)
        assert [token for part in cut for token in part] == list(prompt.token_ids)
        assert len(cut) == len(chunks) + 2
        assert cut[0] == list(prompt.prefix)


# --- weights


def test_the_saved_model_is_written_once_and_is_the_same(tmp_path):
    path = peer_weights("transformers", tmp_path, "anything", tiny_model(), chat_tokenizer())
    saved = AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()
    wanted = tiny_model().state_dict()
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    (path / "mark").touch()
    assert (peer_weights("kvboost", tmp_path, "anything", tiny_model(), chat_tokenizer()) / "mark").exists()


def test_llama_cpp_is_refused_a_model_that_is_not_from_a_gguf_file(tmp_path):
    with pytest.raises(PeerError, match=r"llama.cpp reads GGUF files, in float32; some/model in float32 cannot be"):
        peer_weights("llama.cpp", tmp_path, "some/model", tiny_model(), chat_tokenizer())


def test_a_gguf_file_is_written_again_as_float32(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_context_length(77)
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 3])
    writer.add_add_bos_token(False)
    writer.add_quantization_version(2)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_tensor("w", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    float32_gguf(tmp_path / "q.gguf", tmp_path / "f.gguf")

    read = gguf.GGUFReader(tmp_path / "f.gguf")
    contents = {name: field.contents() for name, field in read.fields.items() if not name.startswith("GGUF.")}
    assert contents == {
        "general.architecture": "llama",
        "llama.context_length": 77,
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.token_type": [1, 3],
        "tokenizer.ggml.add_bos_token": False,
        "general.file_type": gguf.LlamaFileType.ALL_F32,
    }
    (tensor,) = read.tensors
    assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
    assert np.array_equal(tensor.data, gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_1))


# --- set-up


@pytest.fixture
def installing(monkeypatch, tmp_path):
    """Let two peers share one environment whose requirements name nothing that is to be downloaded.

    It runs the tests' own pip: to give it one of its own takes seconds.
    """
    monkeypatch.setattr(environments, "VENV", (*environments.VENV, "--without-pip"))
    monkeypatch.setenv("PYTHONPATH", str(Path(pip.__file__).parents[1]))
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    (requirements / "none.txt").write_text("# nothing\n")
    monkeypatch.setattr("chunkcache.eval.peers.registry.HERE", tmp_path)
    for name in ("one", "two"):
        monkeypatch.setitem(PEERS, name, PeerSpec("none", "worker:Worker", "", needs="luck"))
    return requirements / "none.txt"


def test_environments_are_made_once_for_all_that_share_them(installing, tmp_path):
    said = []
    found = setup_peers(tmp_path / "peers", ["one", "two"], said.append)
    assert [(each.name, each.skipped) for each in found] == [("one", None), ("two", None)]
    assert len(said) == 1
    assert (tmp_path / "peers" / "none" / "bin" / "python").exists()

    setup_peers(tmp_path / "peers", ["one"], said.append)
    assert len(said) == 1

    installing.write_text("# something else\n")
    setup_peers(tmp_path / "peers", ["one"], said.append)
    assert len(said) == 2


def test_one_that_cannot_be_installed_is_skipped_with_the_reason(installing, tmp_path):
    installing.write_text("/no/such/folder\n")
    (found,) = setup_peers(tmp_path / "peers", ["one"])
    assert found.versions == {}
    assert found.skipped.startswith("ERROR: ")
    assert "it needs luck" in found.skipped
    assert not (tmp_path / "peers" / "none").exists()
    assert "/no/such/folder" in (tmp_path / "peers" / "none.log").read_text()

    ran = CliRunner().invoke(bench_peers, ["--into", str(tmp_path / "peers"), "one"])
    assert "skipped one: ERROR" in " ".join(ran.output.split())
    assert "no peer could be set up" in str(ran.exception)


def test_every_peer_is_pinned_to_versions():
    for name, spec in PEERS.items():
        lines = spec.requirements.read_text().split("\n")[:-1]
        assert all("==" in line for line in lines), name
