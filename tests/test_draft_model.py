"""A model as the drafter: tokens never change, its cache is right whatever happens to blocks, depth follows time."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from engine_tools import (
    EOS,
    VOCAB,
    Free,
    FreeDrafts,
    Unmeasured,
    alone,
    eager_speculator,
    make_engine,
    results,
    run,
)
from overlapped import Overlapped
from slot_model import SlotModel

from hasten.backends.base import Batch
from hasten.engine import speculate
from hasten.engine.draft_model import ModelDrafter
from hasten.engine.engine import Engine
from hasten.engine.request import SamplingParams, Sequence
from hasten.engine.speculate import NgramDrafter, Speculator, StepCost
from hasten.errors import ModelError

PROMPTS = [[(i * i + k) % EOS for i in range(5 + 9 * k)] for k in range(5)]
PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 1, "n": 2},
    {"temperature": 1.0, "top_p": 0.6, "top_k": 5, "seed": 2, "logprobs": 1},
    {"temperature": 0.7, "seed": 3, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"seed": 4, "temperature": 1.0, "min_tokens": 20, "ignore_eos": False, "stop": ["ab"]},
]


def make(model: Any, drafter: Any, depth: int = 4, **config: Any) -> Engine:
    engine = make_engine(model=model, **config)
    drafter.allocate(engine.config.num_blocks, 16, "fp32")
    engine.speculator = eager_speculator(depth, FreeDrafts(drafter, engine.config))
    return engine


def slots(wildness: float = 0.3) -> SlotModel:
    return SlotModel(VOCAB, wildness=wildness)


def sampling(params: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 60, "ignore_eos": True, **params})


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("wildness", [0.3, 0.5])
def test_tokens_are_the_same_with_a_drafter(params: dict[str, Any], overlapped: bool, wildness: float) -> None:
    """Also where it is the model itself: then every draft is right, or the drafter's cache is not."""
    model, drafter = slots(), slots(wildness)
    wrap = Overlapped if overlapped else lambda backend: backend
    found = run(make(wrap(model), wrap(drafter)), PROMPTS, sampling(params))
    assert [results(output) for output in found] == [results(alone(prompt, sampling(params))) for prompt in PROMPTS]
    drafted, accepted = (sum(getattr(o.metrics, name) for o in found) for name in ("num_drafted", "num_accepted"))
    assert 0 < accepted <= drafted
    if wildness == 0.3 and sampling(params).ignore_eos:
        assert accepted == drafted
        assert model.forwards < 60 / 3
    elif wildness != 0.3:
        assert accepted < drafted


@pytest.mark.parametrize("overlapped", [False, True])
def test_the_drafters_cache_outlives_preemption_and_shared_prefixes(overlapped: bool) -> None:
    wrap = Overlapped if overlapped else lambda backend: backend
    engine = make(wrap(slots()), wrap(slots()), num_blocks=12, max_len=128, max_step_tokens=40)
    prompts = [[(7 * i) % EOS for i in range(35)] + [k] for k in range(4)]
    params = SamplingParams(max_tokens=60, ignore_eos=True, n=2, temperature=0.5, seed=6)
    for _ in range(2):
        found = run(engine, prompts, params)
        assert [results(output) for output in found] == [results(alone(prompt, params)) for prompt in prompts]
        assert sum(output.metrics.num_drafted for output in found) > 50
        assert all(output.metrics.num_accepted == output.metrics.num_drafted for output in found)
    assert sum(output.metrics.num_preemptions for output in found) > 0
    assert sum(output.metrics.num_cached_tokens for output in found) > 0


def test_after_rejections_drafts_are_those_of_a_fresh_drafter() -> None:
    engine = make(slots(), slots(0.6), depth=3)
    speculator, checked = engine.speculator, []
    assert speculator is not None
    propose = speculator.drafter.propose

    def compare(wanted: list[tuple[Sequence, int]], scheduler: Any, usual: float | None) -> None:
        propose(wanted, scheduler, usual)
        for sequence, depth in wanted:
            fresh = make_engine(model=slots(0.6))
            expected = run(fresh, [sequence.tokens], SamplingParams(max_tokens=depth, ignore_eos=True))[0]
            assert tuple(sequence.drafts) == expected.outputs[0].token_ids
            checked.append(depth)

    speculator.drafter.propose = compare  # type: ignore[method-assign]
    found = run(engine, PROMPTS[:3], sampling({}))
    assert any(0 < output.metrics.num_accepted < output.metrics.num_drafted for output in found)
    assert len(checked) > 40


class Dear(StepCost):
    """A token more costs as much as a step: never draft, but to probe."""

    def of_one_more(self, num_tokens: int) -> float:
        return 1.0


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_drafter_that_rested_catches_up(overlapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "_PROBE_SHARE", 0)  # however long a draft takes here
    wrap = Overlapped if overlapped else lambda backend: backend
    engine = make(wrap(slots()), wrap(slots()), max_step_tokens=16, max_sequences=4)
    assert engine.speculator is not None
    engine.speculator.cost, engine.speculator.waited = Dear(), Unmeasured()
    found = run(engine, PROMPTS[:2], SamplingParams(max_tokens=200, ignore_eos=True))
    assert [o.metrics.num_accepted for o in found] == [o.metrics.num_drafted for o in found]
    assert 8 <= sum(o.metrics.num_drafted for o in found) <= 14  # one each in 32 steps


@pytest.mark.parametrize("overlapped", [False, True])
def test_sequences_that_share_blocks_catch_up_together(overlapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot model refuses a step in which two tokens write one slot."""
    monkeypatch.setattr(speculate, "_PROBE_SHARE", 0)
    wrap = Overlapped if overlapped else lambda backend: backend
    engine = make(wrap(slots()), wrap(slots()), max_sequences=8)
    assert engine.speculator is not None
    engine.speculator.cost, engine.speculator.waited = Dear(), Unmeasured()
    prompts = [[(7 * i) % EOS for i in range(47)] + [k] for k in range(2)]
    for _ in range(2):
        found = run(engine, prompts, SamplingParams(max_tokens=70, ignore_eos=True, n=2, temperature=0.5, seed=6))
        assert sum(o.metrics.num_cached_tokens for o in found) > 0
        assert sum(o.metrics.num_drafted for o in found) >= 4
        assert [o.metrics.num_accepted for o in found] == [o.metrics.num_drafted for o in found]


@pytest.mark.parametrize("call", range(6))
def test_an_interrupted_catch_up_is_done_again(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = slots()
    engine = make(slots(), drafter, max_step_tokens=16, max_sequences=4)
    forward, calls = drafter.forward, iter(range(1000))

    def interrupted(batch: Batch) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return forward(batch)

    monkeypatch.setattr(drafter, "forward", interrupted)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    for prompt in PROMPTS[1:3]:
        engine.add(prompt * 3, params)
    outputs = []
    while engine.num_unfinished:
        with suppress(KeyboardInterrupt):
            outputs += [delta.output for delta in engine.step() if delta.output is not None]
    assert next(calls) > call
    for output in outputs:
        assert results(output) == results(alone(list(output.prompt_token_ids), params))
        assert output.metrics.num_accepted == output.metrics.num_drafted > 20


class Dearer(StepCost):
    """A token more costs more than half a step: drafts at even odds do not pay, better ones do."""

    def of_one_more(self, num_tokens: int) -> float:
        return 0.6


def test_what_others_showed_counts_for_who_has_shown_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "_PROBE_SHARE", 0)
    engine = make(slots(), slots())
    assert engine.speculator is not None
    engine.speculator.cost = Dearer()
    drafted = []
    for prompt in PROMPTS * 3:
        (found,) = run(engine, [prompt], SamplingParams(max_tokens=30, ignore_eos=True))
        drafted.append(found.metrics.num_drafted)
    assert drafted[0] <= 1
    assert min(drafted[6:]) > 10


def test_depth_weighs_the_drafters_time() -> None:
    class Timed(NgramDrafter):
        def seconds(self, num_sequences: int) -> float | None:
            return 0.001 * num_sequences

    speculator = Speculator(Timed())
    for count in (1, 2, 1, 2) * 40:
        speculator.cost.record(count, 0.010)  # a token more costs nothing
    assert speculator._costs(1)[2] == pytest.approx(0.1, rel=0.01)
    assert speculator._costs(8)[2] == pytest.approx(0.8, rel=0.01)
    sequence = type("Decodes", (), {"num_computed": 3, "tokens": [0] * 4})
    sequence.limit, sequence.ngrams = 9, type("Lucky", (), {"luck": 0.75, "extend": lambda self, tokens: None})()
    assert speculator._depths([sequence])[0][1] >= 3  # type: ignore[list-item]
    assert speculator._depths([sequence] * 8)[0][1] == 0  # type: ignore[list-item]


class Slow(SlotModel):
    """Each step takes a while, the first two (to catch up, and a draft) or more longer: something is compiled."""

    def __init__(self, first: float, others: float, num_first: int = 2) -> None:
        super().__init__(VOCAB, wildness=0.3)
        self._seconds = [others, *[first] * num_first]

    def forward(self, batch: Batch) -> Any:
        time.sleep(self._seconds.pop() if len(self._seconds) > 1 else self._seconds[0])
        return super().forward(batch)


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("first", [0.3, 0.012])
def test_a_drafter_that_compiles_at_first_is_tried_again(first: float, overlapped: bool) -> None:
    wrap = Overlapped if overlapped else lambda backend: backend
    engine = make_engine(model=wrap(Slow(0.004, 0.004)))
    drafter = wrap(Slow(first, 0.0002))
    drafter.allocate(engine.config.num_blocks, 16, "fp32")
    engine.speculator = Speculator(ModelDrafter(drafter, engine.config))
    engine.speculator.overlaps = overlapped
    (found,) = run(engine, PROMPTS[:1], SamplingParams(max_tokens=200, ignore_eos=True))
    assert found.metrics.num_accepted > 60


@pytest.mark.parametrize("overlapped", [False, True])
def test_what_drafts_of_all_took_at_first_is_forgotten(overlapped: bool) -> None:
    """Nearly as much as a step of the main model, for four sequences; afterwards one at a time tries."""
    wrap = Overlapped if overlapped else lambda backend: backend
    engine = make_engine(model=wrap(Slow(0.004, 0.004)), num_blocks=128, max_len=1024)
    drafter = wrap(Slow(0.0038, 0.0014, num_first=8))
    drafter.allocate(engine.config.num_blocks, 16, "fp32")
    engine.speculator = Speculator(ModelDrafter(drafter, engine.config))
    engine.speculator.overlaps = overlapped
    found = run(engine, PROMPTS[:4], SamplingParams(max_tokens=500, ignore_eos=True))
    assert sum(output.metrics.num_accepted for output in found) > 200


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hasten.compress.folder import compress

    folder = tmp_path_factory.mktemp("drafter") / "int4"
    compress("demo", "int4-g32", folder)
    return folder


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.95, "seed": 5}, {"temperature": 1.0, "seed": 9}]
)
def test_demo_with_its_int4_copy_as_the_drafter(int4: Path, params: dict[str, Any]) -> None:
    from hasten import LLM

    prompts = ["Once upon a time", "The little dog", "One day, a girl named Lily found a big red ball in the park."]
    asked = SamplingParams(max_tokens=80, ignore_eos=True, **params)
    plain = LLM("demo").generate(prompts, asked)
    llm = LLM("demo", drafter=str(int4))
    assert llm.engine.speculator is not None
    llm.engine.speculator.max_depth = 8
    llm.engine.speculator.cost, llm.engine.speculator.drafter.seconds = Free(), lambda _: 0.0  # type: ignore[method-assign]
    drafted = llm.generate(prompts, asked)
    assert [output.outputs for output in drafted] == [output.outputs for output in plain]
    accepted, tried = (sum(getattr(o.metrics, n) for o in drafted) for n in ("num_accepted", "num_drafted"))
    assert 0.4 * tried < accepted < tried  # of eight in a row: nine in ten each


def test_a_drafter_of_another_vocabulary_is_refused(tiny_model: Callable[..., Path]) -> None:
    from hasten import LLM

    with pytest.raises(ModelError, match="has a vocabulary of 307 tokens, expected the model's 4096"):
        LLM("demo", drafter=str(tiny_model("llama")))
