"""The chunkcache-rag pipeline: transformers' way in, and the same answers as `llm.generate`."""

from __future__ import annotations

import pytest
from support.llm import QUESTION, TEXTS, chat_tokenizer, saved_model, tiny_model, wrapped
from torch.utils.data import Dataset
from transformers import GenerationConfig, TextStreamer, pipeline

import chunkcache
from chunkcache.errors import ContextLengthError, InputError, PolicyError, PromptError
from chunkcache.integrations.transformers import TASK, ChunkCacheRagPipeline

INPUT = {"question": QUESTION, "chunks": list(TEXTS)}


def rag(**options):
    options = {"do_sample": False, "max_new_tokens": 8, **options}
    return pipeline("chunkcache-rag", model=tiny_model(), tokenizer=chat_tokenizer(), **options)


def direct(question=QUESTION, chunks=TEXTS, **options):
    return wrapped().generate(question, chunks, **{"do_sample": False, "max_new_tokens": 8, **options})


def test_the_answer_is_that_of_the_direct_call():
    pipe = rag()
    assert isinstance(pipe, ChunkCacheRagPipeline)
    assert isinstance(pipe.llm, chunkcache.CachedLLM)
    answer, expected = pipe(INPUT), direct()
    assert answer["generated_text"] == expected.text
    assert answer["ttft_s"] == answer["stats"]["ttft_s"] > 0
    assert {**answer["stats"], **seconds(answer)} == {**expected.stats.as_dict(), **seconds(answer)}
    assert set(answer) == {"generated_text", "ttft_s", "stats"}


def seconds(answer):
    return {name: value for name, value in answer["stats"].items() if name.endswith("_s")}


def test_a_list_gives_a_list_and_reuses_what_came_before():
    other = {"question": "Who wrote down the weather?", "chunks": TEXTS[2:]}
    answers = rag()([INPUT, other, INPUT])
    assert [answer["generated_text"] for answer in answers] == [
        direct().text,
        direct(other["question"], other["chunks"]).text,
        direct().text,
    ]
    assert [answer["stats"]["misses"] for answer in answers] == [3, 0, 0]
    assert rag()([]) == []
    assert len(rag()([INPUT])) == 1


def test_generators_and_datasets_give_an_iterator():
    class Inputs(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {**INPUT, "id": index}

    pipe = rag()
    for inputs in (Inputs(), ({**INPUT, "id": index} for index in range(2))):
        answers = pipe(inputs)
        assert not isinstance(answers, list)
        assert [answer["generated_text"] for answer in answers] == [direct().text] * 2


def test_the_system_prompt_is_the_inputs_or_the_pipelines():
    pipe = rag(system="Be brief.")
    brief, long = direct(system="Be brief.").text, direct(system="Be very long.").text
    assert brief != long != direct().text
    assert pipe(INPUT)["generated_text"] == brief
    assert pipe({**INPUT, "system": "Be very long."})["generated_text"] == long
    assert pipe(INPUT, system="Be very long.")["generated_text"] == long
    assert pipe({**INPUT, "system": None})["generated_text"] == direct().text


def test_keywords_of_generate_at_construction_and_at_a_call():
    pipe = rag(max_new_tokens=2)
    assert pipe(INPUT)["generated_text"] == direct(max_new_tokens=2).text
    assert pipe(INPUT, max_new_tokens=5)["generated_text"] == direct(max_new_tokens=5).text
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    configured = pipeline(TASK, model=tiny_model(), tokenizer=chat_tokenizer(), generation_config=config)
    assert configured(INPUT)["generated_text"] == direct(max_new_tokens=3).text


def test_a_streamer_gets_the_answer(capsys):
    answer = rag()(INPUT, streamer=TextStreamer(chat_tokenizer(), skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out.strip() == answer["generated_text"]


def test_store_policy_salt_and_instruction_are_those_of_wrap():
    store = chunkcache.open_store("memory://")
    own = {"store": store, "policy": "reuse", "tenant": "a", "instruction": "Say what is true."}
    pipe, llm = rag(**own), wrapped(**own)
    answer = pipe(INPUT)
    assert pipe.llm.store is store
    assert answer["stats"]["policy"] == "reuse"
    assert llm.generate(QUESTION, TEXTS, do_sample=False, max_new_tokens=8).stats.hits == 3
    assert llm.keys(TEXTS) == pipe.llm.keys(TEXTS)
    assert pipe(INPUT, policy="full")["stats"]["policy"] == "full"
    with pytest.raises(PolicyError):
        rag(policy="nonsense")
    with pytest.raises(PolicyError):
        pipe(INPUT, policy="nonsense")


def test_a_calibration_is_passed_on(tmp_path):
    with pytest.raises(chunkcache.CalibrationError, match="missing"):
        rag(policy="cachecraft:alpha=auto", calibration=tmp_path / "missing.json")


def test_precomputed_chunks_are_hits():
    pipe = rag()
    pipe.llm.precompute(TEXTS)
    assert pipe(INPUT)["stats"]["hits"] == 3


def test_a_saved_model_by_its_path(tmp_path):
    pipe = pipeline(TASK, model=saved_model(tmp_path), max_new_tokens=8, do_sample=False)
    assert pipe(INPUT)["generated_text"] == direct().text


def test_what_it_saves_loads_as_any_model_does(tmp_path):
    rag().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert pipeline(TASK, model=str(tmp_path), max_new_tokens=8, do_sample=False)(INPUT)["generated_text"] == (
        direct().text
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chunks": []}, r'no "question", only \[\'chunks\'\]'),
        ({"question": QUESTION, "context": []}, r'no "chunks", only \[\'context\', \'question\'\]'),
        ({"question": [QUESTION], "chunks": []}, '"question" is a list'),
        ({"question": " ", "chunks": []}, "question is empty"),
        ({"question": QUESTION, "chunks": TEXTS[0]}, '"chunks" is a str'),
        ({"question": QUESTION, "chunks": None}, '"chunks" is a NoneType'),
        ({"question": QUESTION, "chunks": [TEXTS[0], 7]}, '"chunks" has a int at index 1'),
        ({"question": QUESTION, "chunks": [TEXTS[0], " "]}, '"chunks" has an empty string at index 1'),
        ({"question": QUESTION, "chunks": [], "system": 7}, '"system" is a int'),
        (QUESTION, "an input is a str"),
        ((INPUT, INPUT), "an input is a tuple"),
        ([INPUT, QUESTION], "an input is a str"),
    ],
)
def test_bad_inputs_name_the_field(given, message):
    with pytest.raises(PromptError, match=message):
        rag()(given)


def test_no_chunks_is_a_question_by_itself():
    assert rag()({"question": QUESTION, "chunks": []})["generated_text"] == direct(chunks=[]).text


def test_batches_are_refused():
    with pytest.raises(PromptError, match="batch_size=4: chunkcache serves one sequence at a time"):
        rag(batch_size=4)
    with pytest.raises(PromptError, match="batch_size=4"):
        rag()([INPUT, INPUT], batch_size=4)
    assert len(rag(batch_size=1)([INPUT, INPUT], batch_size=1)) == 2
    with pytest.raises(InputError, match="num_return_sequences=2"):
        rag()(INPUT, num_return_sequences=2)


def test_what_does_not_fit_the_model_is_refused():
    with pytest.raises(ContextLengthError):
        rag()({"question": "word " * 600, "chunks": []})


def test_a_model_without_its_tokenizer_is_refused():
    with pytest.raises(PromptError, match="no tokenizer"):
        ChunkCacheRagPipeline(tiny_model())
