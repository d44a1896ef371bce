"""LLM as a user meets it: prompts of every kind, streams, defaults and settings of the folder, interrupts, errors."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten import LLM, SamplingParams
from hasten.engine.config import EngineConfig
from hasten.errors import ModelError, RequestError, ResourceError
from hasten.hardware import memory_available

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), max_len=128) as made:
        yield made


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def assert_idle(llm: LLM) -> None:
    assert llm.engine.num_unfinished == 0
    assert llm.engine.scheduler.pool.num_used == 0
    llm.engine.scheduler.check()


def test_prompts_of_every_kind(llm: LLM) -> None:
    ids = llm.tokenizer.encode("the rain")
    by_text, by_ids, by_list, by_array = (
        llm.generate(prompt, GREEDY)[0] for prompt in ("the rain", ids, ["the rain"], np.array(ids))
    )
    assert by_text.outputs == by_ids.outputs == by_list.outputs == by_array.outputs
    assert (by_text.prompt, by_ids.prompt) == ("the rain", None)
    assert by_text.text == llm.tokenizer.decode([*ids, *by_text.outputs[0].token_ids])[len("the rain") :]
    each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 5)]
    assert [len(o.outputs[0].token_ids) for o in llm.generate(["a", "b"], each)] == [3, 5]
    assert llm.generate([]) == []
    with pytest.raises(RequestError, match="expected text or a list of token ids"):
        llm.generate([["a"]])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="1 sampling parameters for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])
    assert_idle(llm)


@pytest.mark.parametrize(
    "prompts", [None, 5, b"abc", {"a": 1}, {1: 2}, (p for p in "ab"), [None], ["a", {1: 2}], [b"abc"], np.array(3)]
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError, match=r"prompts? is .*, expected text"):
        llm.generate(prompts)
    assert_idle(llm)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, [{"max_tokens": 3}], 3, "x"])
def test_what_is_no_sampling_parameters_is_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(RequestError, match=r"params is .*, expected SamplingParams"):
        llm.generate("a", params)
    with pytest.raises(RequestError, match=r"params is .*, expected SamplingParams"):
        llm.stream("a", params)
    assert_idle(llm)


@pytest.mark.parametrize("messages", [None, "hello", {"role": "user", "content": "x"}, ["hello"], [None], 3])
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any) -> None:
    for call in (llm.chat, llm.stream_chat):
        with pytest.raises(RequestError, match=r"messages? is .*, expected"):
            call(messages, GREEDY)
    assert_idle(llm)


def test_a_stream_is_refused_where_it_is_asked_for(llm: LLM) -> None:
    with pytest.raises(RequestError, match="the prompt has 200 tokens"):
        llm.stream([5] * 200, GREEDY)
    with pytest.raises(RequestError, match="chat template"):
        llm.stream_chat([{"role": "user"}], GREEDY)
    assert_idle(llm)


def test_a_stream_that_is_never_read_is_cancelled(llm: LLM) -> None:
    stream = llm.stream("never read", GREEDY)
    assert llm.engine.num_unfinished == 1
    del stream
    assert_idle(llm)


def test_a_stream_gets_what_others_steps_made_before_it_was_read(llm: LLM) -> None:
    expected = llm.generate("early", GREEDY)[0].text
    stream = llm.stream("early", GREEDY)
    llm.generate("another", SamplingParams(max_tokens=5, ignore_eos=True))
    assert "".join(delta.text for delta in stream) == expected


def test_stream_gives_the_same_text_in_pieces(llm: LLM) -> None:
    whole = llm.generate("a tale", GREEDY)[0]
    deltas = list(llm.stream("a tale", GREEDY))
    assert "".join(d.text for d in deltas) == whole.text
    assert [t for d in deltas for t in d.token_ids] == list(whole.outputs[0].token_ids)
    assert len(deltas) > 10
    assert deltas[-1].output is not None
    assert deltas[-1].output.outputs == whole.outputs
    assert all(d.output is None for d in deltas[:-1])


def test_streams_may_be_interleaved_and_left(llm: LLM) -> None:
    expected = {p: llm.generate(p, GREEDY)[0].text for p in ("one", "two")}
    one, two = llm.stream("one", GREEDY), llm.stream("two", GREEDY)
    left = llm.stream("three", GREEDY)
    next(left)
    texts = {"one": "", "two": ""}
    for a, b in zip(one, two, strict=True):
        texts["one"] += a.text
        texts["two"] += b.text
        llm.generate("four", SamplingParams(max_tokens=2))
    left.close()  # type: ignore[attr-defined]
    assert texts == expected
    assert_idle(llm)


def test_chat_applies_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    ids = llm.tokenizer.encode_chat(messages)
    expected = llm.generate(ids, GREEDY)[0].outputs
    assert llm.chat(messages, GREEDY)[0].outputs == expected
    assert [o.outputs for o in llm.chat([messages, messages], GREEDY)] == [expected, expected]
    assert "".join(d.text for d in llm.stream_chat(messages, GREEDY)) == expected[0].text


def test_an_interrupt_leaves_the_engine_clean(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate(["a", "b"], GREEDY)
    forward, steps = llm.backend.forward, []

    def interrupted(batch: Any) -> Any:
        steps.append(batch)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return forward(batch)

    monkeypatch.setattr(llm.backend, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b", "c"], GREEDY)
    assert_idle(llm)
    assert [o.outputs for o in llm.generate(["a", "b"], GREEDY)] == [o.outputs for o in expected]


def test_a_bad_prompt_among_good_ones_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"the prompt has 200 tokens.*128 \(max_len\)"):
        llm.generate(["good", [5] * 200], GREEDY)
    assert_idle(llm)


def test_generation_config_is_honoured_under_what_is_given(copied: Path) -> None:
    (copied / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 5.0, "eos_token_id": [2, 9]})
    )
    llm = LLM(str(copied))
    assert set(llm.engine.config.eos_token_ids) == {2, 9}
    loose = {llm.generate("x", SamplingParams(max_tokens=12, seed=i))[0].outputs[0].token_ids for i in range(4)}
    assert len(loose) == 4  # sampled, as the file says
    given = {
        llm.generate("x", SamplingParams(max_tokens=12, seed=i, temperature=0))[0].outputs[0].token_ids
        for i in range(4)
    }
    assert len(given) == 1


def test_settings_that_tune_wrote_are_used_unless_told_otherwise(copied: Path) -> None:
    def configure(section: object) -> None:
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps({**config, "hasten": section}))

    assert LLM(str(copied)).kv_cache == "fp32"
    configure({"run": {"kv_cache": "int8", "speculation": "ngram", "threads": 1}})
    llm = LLM(str(copied))
    assert (llm.kv_cache, llm.backend.threads, llm.engine.speculator is None) == ("int8", 1, False)  # type: ignore[attr-defined]
    llm = LLM(str(copied), kv_cache="bf16", speculation="none", threads=2)
    assert (llm.kv_cache, llm.backend.threads, llm.engine.speculator) == ("bf16", 2, None)  # type: ignore[attr-defined]
    configure({"run": {"kv_cash": "int8"}})
    with pytest.raises(ModelError, match=r"config\.json: hasten\.run: unknown key 'kv_cash'.*'kv_cache'"):
        LLM(copied)


def test_sizes_of_the_cache(folder: Path) -> None:
    assert LLM(str(folder)).max_len == 256
    small = LLM(str(folder), memory=LLM(str(folder)).backend.block_bytes(32, "fp32") * 2)
    assert (small.max_len, small.engine.config.num_blocks) == (64, 2)
    with pytest.raises(ResourceError, match="max_len is 300, expected 1 to 256"):
        LLM(str(folder), max_len=300)
    with pytest.raises(ResourceError, match="memory"):
        LLM(str(folder), memory=4 * memory_available())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_sequences", 0), ("max_sequences", 1.5), ("max_sequences", "2"), ("max_step_tokens", 0), ("max_len", "9"),
        ("max_len", 0), ("max_len", True), ("threads", "2"), ("threads", -1), ("block_size", 0), ("block_size", "32"),
        ("memory", "1"), ("memory", True), ("memory", float("nan")),
    ],
)  # fmt: skip
def test_sizes_that_are_none_are_named(folder: Path, name: str, value: object) -> None:
    with pytest.raises((RequestError, ResourceError), match=f"{name} is .*, expected"):
        LLM(folder, **{name: value})  # type: ignore[arg-type]


def test_sizes_of_an_engine_are_checked() -> None:
    sizes = {"vocab_size": 8, "num_blocks": 2, "block_size": 16, "max_len": 32}
    assert EngineConfig(**sizes).max_blocks == 2
    for name in (*sizes, "max_sequences", "max_step_tokens"):
        with pytest.raises(RequestError, match=f"{name} is 0, expected a whole number >= 1"):
            EngineConfig(**{**sizes, name: 0})


def test_too_many_threads_are_refused(folder: Path) -> None:
    with pytest.raises(ResourceError, match="threads is 100000, expected 0"):
        LLM(folder, device="cpu", threads=100_000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kv_cache": "fp8"}, "kv_cache is 'fp8'"),
        ({"speculation": "magic"}, "speculation is"),
        ({"device": "tpu"}, "device is"),
        ({"device": "cpu", "format": "fp8"}, "format fp8 on load needs a GPU"),
        ({"speculation": "ngram", "drafter": "demo"}, "give one of them"),
    ],
)
def test_wrong_values_are_named(folder: Path, arguments: dict[str, str], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        LLM(str(folder), **arguments)  # type: ignore[arg-type]


def test_typing_errors_raise(folder: Path) -> None:
    with pytest.raises(TypeError, match="max_length"):
        LLM(str(folder), max_length=5)  # type: ignore[call-arg]


def test_texts_of_stop_strings_and_seeds_do_not_depend_on_company(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.9, seed=11, stop=["e", "t"], n=2)
    lone = llm.generate("when", params)[0].outputs
    crowd = llm.generate(
        ["x", "when", "yes and no"], [SamplingParams(temperature=2.0), params, SamplingParams(max_tokens=9)]
    )
    assert crowd[1].outputs == lone


@pytest.mark.parametrize("kv_cache", ["bf16", "int8"])
def test_speculation_is_exact_with_every_cache(folder: Path, kv_cache: str) -> None:
    prompts = ["to be or not to be or not to be", "a a a a a a", "x"]
    for params in (GREEDY, SamplingParams(max_tokens=60, temperature=0.8, seed=5, ignore_eos=True)):
        plain = LLM(str(folder), kv_cache=kv_cache).generate(prompts, params)  # type: ignore[arg-type]
        drafted = LLM(str(folder), kv_cache=kv_cache, speculation="ngram").generate(prompts, params)  # type: ignore[arg-type]
        assert [o.outputs for o in plain] == [o.outputs for o in drafted]
