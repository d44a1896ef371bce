"""Steps launched before the last one's result: the same tokens as one by one, on a device that works by itself."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from engine_tools import (
    EOS,
    VOCAB,
    Unmeasured,
    alone,
    assert_idle,
    assert_interrupt_changes_nothing,
    drain,
    eager_speculator,
    make_engine,
    results,
    run,
)
from overlapped import Overlapped
from slot_model import SlotModel

from hasten.engine.engine import Engine
from hasten.engine.request import SamplingParams
from hasten.engine.speculate import Speculator, StepCost
from hasten.errors import ModelError

PROMPTS = [[(i * i + k) % EOS for i in range(5 + 9 * k)] for k in range(5)]


def device(**more: Any) -> Overlapped:
    return Overlapped(SlotModel(VOCAB, wildness=0.3), **more)


@pytest.mark.parametrize(
    "params",
    [
        {"ignore_eos": True},
        {},  # ends that are not foreseen
        {"temperature": 0.8, "seed": 1, "n": 3, "logprobs": 2},
        {"temperature": 1.0, "top_p": 0.6, "seed": 2, "stop": ["ab", "fe"]},
        {"seed": 4, "min_tokens": 20, "temperature": 1.0, "logit_bias": {3: 2.0}},
        {"ignore_eos": True, "stop_token_ids": (4,), "temperature": 1.5, "seed": 3},
    ],
)
def test_tokens_equal_those_one_by_one(params: dict[str, Any]) -> None:
    model = device()
    sampling = SamplingParams(**{"max_tokens": 60, **params})
    found = run(make_engine(model=model), PROMPTS, sampling)
    assert [results(output) for output in found] == [results(alone(prompt, sampling)) for prompt in PROMPTS]
    assert model.most_ahead == 2
    assert model.num_filled > 30


@pytest.mark.parametrize(
    "params", [{"repetition_penalty": 1.3}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}, {"prompt_logprobs": 1}]
)
def test_what_needs_the_last_token_waits_for_it(params: dict[str, Any]) -> None:
    """Penalties count every token; scores follow from the one before. Beside them others are right too."""
    model = device()
    sampling = [SamplingParams(max_tokens=40, ignore_eos=True, **params), SamplingParams(max_tokens=60)]
    found = run(make_engine(model=model, max_step_tokens=16), PROMPTS[3:], sampling)
    assert [results(o) for o in found] == [results(alone(p, s)) for p, s in zip(PROMPTS[3:], sampling, strict=True)]


def test_the_next_step_is_given_while_the_last_one_runs() -> None:
    """The device is held in its first step: step() must have given it the second by then."""
    gate = threading.Event()
    model = device(before=gate.wait)
    engine = make_engine(model=model)
    engine.add(PROMPTS[0], SamplingParams(max_tokens=4, ignore_eos=True))
    deltas: list[Any] = []
    thread = threading.Thread(target=lambda: deltas.extend(engine.step()))
    thread.start()
    while model.most_ahead < 2:
        assert thread.is_alive()
    gate.set()
    thread.join()
    assert len(deltas[0].token_ids) == 1
    drain(engine)


def test_a_length_known_in_advance_costs_no_step() -> None:
    model = device()
    run(make_engine(model=model), [PROMPTS[0]], SamplingParams(max_tokens=7, ignore_eos=True))
    assert model.forwards == 7


def test_a_token_on_its_way_is_no_output() -> None:
    engine = make_engine(model=device())
    params = SamplingParams(max_tokens=50, ignore_eos=True, n=2, seed=1)
    request_id = engine.add(PROMPTS[1], params)
    for _ in range(6):
        engine.step()
    output = engine.cancel(request_id)
    assert output is not None
    whole = alone(PROMPTS[1], params)
    for found, expected in zip(output.outputs, whole.outputs, strict=True):
        assert 4 <= len(found.token_ids) <= 6
        assert found.token_ids == expected.token_ids[: len(found.token_ids)]
    assert output.metrics.num_output_tokens == sum(len(o.token_ids) for o in output.outputs)
    assert_idle(engine)


class Interrupts(Overlapped):
    """Ctrl-C in the call after `countdown` others: of forward, of sample, or while a result is waited for."""

    def __init__(self, where: str, countdown: int) -> None:
        super().__init__(SlotModel(VOCAB, wildness=0.3))
        self.where, self.countdown = where, countdown

    def hit(self, where: str) -> None:
        if where == self.where:
            self.countdown -= 1
            if self.countdown == 0:
                raise KeyboardInterrupt

    def forward(self, batch: Any) -> Any:
        self.hit("before forward")
        logits = super().forward(batch)
        self.hit("after forward")
        return logits

    def sample(self, logits: Any, params: Any) -> Any:
        pending = super().sample(logits, params)
        self.hit("after sample")
        return pending

    def note_result(self, pending: Any) -> None:
        self.hit("result")
        super().note_result(pending)


@pytest.mark.parametrize("where", ["before forward", "after forward", "after sample", "result"])
@pytest.mark.parametrize("countdown", [1, 2, 3, 9])
def test_an_interrupt_changes_nothing(where: str, countdown: int) -> None:
    prompts = [[(3 * i + k) % VOCAB for i in range(25)] for k in range(3)]
    assert_interrupt_changes_nothing(Interrupts(where, countdown), prompts)


def test_nan_names_no_innocent() -> None:
    """Where one request's logits are not numbers, the error comes until it is cancelled; the rest goes on."""

    class Broken(SlotModel):
        def forward(self, batch: Any) -> np.ndarray:
            logits = super().forward(batch)
            first = np.concatenate([[0], np.cumsum(batch.query_lens)[:-1]])
            owner = np.searchsorted(first, batch.rows, side="right") - 1
            logits[batch.context_lens[owner] > 30] = np.nan  # only the second gets as long
            return logits

        def sample(self, logits: Any, params: Any) -> Any:
            bad = np.isnan(logits).any(axis=1)
            sampled = super().sample(np.nan_to_num(logits), params)
            sampled.tokens[bad] = -1
            return sampled

    engine = make_engine(model=Overlapped(Broken(VOCAB, wildness=0.3)))
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    good, bad = engine.add([1, 2, 3], params), engine.add([5] * 20, params)
    done: dict[str, Any] = {}
    for _ in range(11):  # 20 tokens, then one a step
        step_into(engine, done)
    for _ in range(2):
        with pytest.raises(ModelError, match="NaN"):
            engine.step()
    output = engine.cancel(bad)
    assert output is not None
    assert min(output.outputs[0].token_ids) >= 0
    while engine.num_unfinished:
        step_into(engine, done)
    assert results(done[good]) == results(alone([1, 2, 3], params))


def step_into(engine: Engine, done: dict[str, Any]) -> None:
    done.update({delta.request_id: delta.output for delta in engine.step() if delta.output is not None})


class Dear(StepCost):
    """A token more costs as much as a step: never draft, but to probe."""

    def of_one_more(self, num_tokens: int) -> float:
        return 1.0


@pytest.mark.parametrize("dear", [True, False])
def test_where_drafting_rests_steps_run_ahead(dear: bool) -> None:
    speculator, model = Speculator() if dear else eager_speculator(), device()
    if dear:
        speculator.cost, speculator.waited = Dear(), Unmeasured()
    sampling = SamplingParams(max_tokens=150, ignore_eos=True, temperature=0.7, seed=1)
    found = run(make_engine(model=model, speculator=speculator), PROMPTS[:3], sampling)
    assert [results(output) for output in found] == [results(alone(prompt, sampling)) for prompt in PROMPTS[:3]]
    assert (model.num_filled > 350) == dear, model.num_filled


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    return [[(7 * i + k) % EOS for i in range(length)] for k, length in enumerate(lengths)]


def test_preempted_with_a_token_on_its_way() -> None:
    """Too few blocks for all: sequences lose theirs while their next token is sampled, and come back right."""
    model = device()
    engine = make_engine(model=model, num_blocks=9, max_len=128, max_step_tokens=64)
    sampling = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.4, seed=3)
    prompts = prompts_of([20, 17, 30, 9])
    found = run(engine, prompts, sampling)
    assert sum(output.metrics.num_preemptions for output in found) > 2
    assert [results(output) for output in found] == [results(alone(prompt, sampling)) for prompt in prompts]
