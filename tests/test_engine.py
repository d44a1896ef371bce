"""What the engine promises of a request: where it ends and why, what its text is, what it costs, what it refuses.

Runs the slot model, whose tokens come from what is in its cache (slot_model.py).
"""

import math

import numpy as np
import pytest
from engine_tools import (
    EOS,
    VOCAB,
    alone,
    assert_idle,
    assert_interrupt_changes_nothing,
    drain,
    make_engine,
    results,
    run,
)
from slot_model import SlotModel

from hasten.engine.request import SamplingParams, derive_seed
from hasten.errors import ModelError, RequestError

PROMPT = [1, 2, 3, 4, 5]
LONG = [(5 * i * i + i) % EOS for i in range(100)]


def test_ragged_batch_equals_lone_runs_in_chunks() -> None:
    prompts = [LONG[:n] for n in (1, 3, 16, 17, 40, 100)]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    model = SlotModel(VOCAB, wildness=0.3)
    outputs = run(make_engine(model=model, max_step_tokens=13, max_sequences=8), prompts, params)
    assert model.most_tokens <= 13
    for prompt, output in zip(prompts, outputs, strict=True):
        assert results(output) == results(alone(prompt, params))
        assert len(output.outputs[0].token_ids) == 40
        assert output.outputs[0].finish_reason == "length"


def test_ends_at_eos_and_goes_on_where_ignored() -> None:
    free = alone(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True)).outputs[0]
    assert EOS in free.token_ids
    ended = alone(PROMPT, SamplingParams(max_tokens=100)).outputs[0]
    assert ended.token_ids == free.token_ids[: free.token_ids.index(EOS) + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert free.text.startswith(ended.text)
    assert chr(97 + EOS) not in ended.text


def test_stop_token_is_named_and_left_out_of_the_text_unless_asked_for() -> None:
    free = alone(PROMPT, SamplingParams(max_tokens=60, ignore_eos=True)).outputs[0]
    token = free.token_ids[20]
    first = free.token_ids.index(token)
    for include in (False, True):
        params = SamplingParams(max_tokens=60, ignore_eos=True, stop_token_ids=(token,), include_stop_str=include)
        output = alone(PROMPT, params).outputs[0]
        assert output.token_ids == free.token_ids[: first + 1]
        assert (output.finish_reason, output.stop_reason) == ("stop", token)
        assert output.text.endswith(chr(97 + token)) == include


@pytest.mark.parametrize("speculation", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string(include: bool, speculation: bool) -> None:
    params = SamplingParams(max_tokens=80, ignore_eos=True)
    free = alone(PROMPT, params).outputs[0].text
    stop = free[30:33]
    end = free.index(stop) + (len(stop) if include else 0)
    params = SamplingParams(max_tokens=80, ignore_eos=True, stop=stop, include_stop_str=include)
    engine = make_engine(speculation=speculation)
    engine.add(PROMPT, params)
    pieces = []
    while engine.num_unfinished:
        for delta in engine.step():
            pieces.append(delta.text)
            assert free.startswith("".join(pieces)), "text was given out that a stop string takes back"
            output = delta.output
    assert output is not None
    assert "".join(pieces) == output.text == free[:end]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_min_tokens_bans_every_end_until_then() -> None:
    params = SamplingParams(max_tokens=100, temperature=1.0, seed=3, stop_token_ids=(4,))
    assert len(alone(PROMPT, params).outputs[0].token_ids) < 30
    held = alone(PROMPT, SamplingParams(max_tokens=100, temperature=1.0, seed=3, stop_token_ids=(4,), min_tokens=30))
    ids = held.outputs[0].token_ids
    assert len(ids) > 30
    assert not {4, EOS} & set(ids[:30])


def test_without_max_tokens_a_sequence_ends_where_the_cache_does() -> None:
    output = run(make_engine(num_blocks=3), [PROMPT], SamplingParams(ignore_eos=True))[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (3 * 16 - len(PROMPT), "length")
    output = run(make_engine(max_len=20), [PROMPT], SamplingParams(ignore_eos=True, max_tokens=99))[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (15, "length")


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "prompt is empty"),
        ([1] * 48, {}, r"48 tokens.*holds 48 tokens \(3 blocks of 16\)"),
        ([1, VOCAB], {}, f"prompt holds token {VOCAB}, expected 0 to {VOCAB - 1}"),
        ([1], {"logit_bias": {99: 1.0}}, "logit_bias holds token 99"),
        ([1], {"stop_token_ids": [50]}, "stop_token_ids holds token 50"),
        ([1], {"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_refuses_what_cannot_be_served(prompt: list[int], params: dict[str, object], words: str) -> None:
    engine = make_engine(num_blocks=3)
    with pytest.raises(RequestError, match=words) as caught:
        engine.add(prompt, SamplingParams(**params))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert_idle(engine)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("n", 1.5), ("n", True), ("max_tokens", -1), ("min_tokens", -1), ("temperature", -0.1),
        ("temperature", math.nan), ("temperature", "hot"), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 2),
        ("repetition_penalty", 0), ("presence_penalty", 3), ("frequency_penalty", math.inf), ("seed", -1),
        ("seed", 2**64), ("stop", [""]), ("stop", 5), ("stop_token_ids", [-1]), ("logit_bias", {1: math.nan}),
        ("logit_bias", [1]), ("logprobs", -1), ("prompt_logprobs", -1), ("ignore_eos", 1), ("priority", 0.5),
    ],
)  # fmt: skip
def test_sampling_params_name_what_is_wrong(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


def test_sampling_params_refuse_typing_errors() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


def test_defaults_fill_only_what_is_not_given() -> None:
    filled = SamplingParams(top_p=0.5).with_defaults({"temperature": 0.6, "top_p": 0.9, "max_tokens": 7})
    assert (filled.temperature, filled.top_p, filled.max_tokens, filled.top_k) == (0.6, 0.5, 7, 0)
    assert SamplingParams(temperature=0.0).with_defaults({"temperature": 0.6}).temperature == 0.0


def test_n_shares_the_prompt_and_samples_apart() -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=9, max_tokens=30, ignore_eos=True)
    prompt = LONG[:40]
    model = SlotModel(VOCAB, wildness=0.3)
    output = run(make_engine(model=model), [prompt], params)[0]
    assert model.copies == 3  # the partly filled block of the prompt
    assert output.metrics.num_cached_tokens == 3 * 39
    assert len({c.token_ids for c in output.outputs}) == 4
    assert derive_seed(9, 0) == 9  # the first is what n = 1 gives
    for c in output.outputs:
        single = SamplingParams(temperature=1.0, seed=derive_seed(9, c.index), max_tokens=30, ignore_eos=True)
        assert alone(prompt, single).outputs[0].token_ids == c.token_ids


def test_prefix_is_reused_and_computed_once() -> None:
    model = SlotModel(VOCAB, wildness=0.3)
    engine = make_engine(model=model)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    first, second, third = run(engine, [[*LONG[:64], i] for i in range(3)], params)
    assert [o.metrics.num_cached_tokens for o in (first, second, third)] == [0, 64, 64]
    again = run(engine, [[*LONG[:64], 1]], params)[0]
    assert again.metrics.num_cached_tokens == 64
    assert results(again) == results(second) == results(alone([*LONG[:64], 1], params))


def test_a_conversation_reuses_its_own_answer() -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    first = run(engine, [LONG[:20]], params)[0]
    history = LONG[:20] + list(first.outputs[0].token_ids) + [3, 1]
    second = run(engine, [history], params)[0]
    assert second.metrics.num_cached_tokens == 48
    assert results(second) == results(alone(history, params))


def test_preempted_requests_resume_to_the_same_tokens() -> None:
    params = SamplingParams(max_tokens=60, temperature=0.7, seed=5, ignore_eos=True)
    engine = make_engine(num_blocks=8)
    outputs = run(engine, [LONG[i : i + 20] for i in range(4)], params)
    assert sum(o.metrics.num_preemptions for o in outputs) > 0
    for i, output in enumerate(outputs):
        assert results(output) == results(alone(LONG[i : i + 20], params))


def test_a_scored_prompt_that_is_preempted_goes_on_where_it_was() -> None:
    engine = make_engine(num_blocks=6, max_step_tokens=8, max_sequences=2)
    params = SamplingParams(max_tokens=5, prompt_logprobs=2, logprobs=1, priority=1, ignore_eos=True)
    slow = engine.add(LONG[:70], params)
    for _ in range(6):
        engine.step()
    engine.add(LONG[30:70], SamplingParams(max_tokens=30, ignore_eos=True))
    output = drain(engine)[slow]
    assert output.metrics.num_preemptions > 0
    assert results(output) == results(alone(LONG[:70], params))


def test_priority_decides_who_waits() -> None:
    engine = make_engine(num_blocks=6, max_sequences=2)
    slow = [engine.add(LONG[i : i + 20], SamplingParams(max_tokens=20, ignore_eos=True, priority=1)) for i in range(3)]
    engine.step()
    urgent = engine.add(LONG[50:70], SamplingParams(max_tokens=20, ignore_eos=True, priority=0))
    order = []
    while engine.num_unfinished:
        order += [delta.request_id for delta in engine.step() if delta.output is not None]
        engine.scheduler.check()
    assert order[0] == urgent or engine.num_unfinished == 0
    assert order.index(urgent) < order.index(slow[1])
    assert order.index(slow[0]) < order.index(slow[2])


def test_seeded_request_gives_the_same_in_any_company() -> None:
    seeded = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.95, seed=123, ignore_eos=True, logprobs=2)
    wild = SamplingParams(max_tokens=50, temperature=1.5, ignore_eos=True)
    lone = results(alone(PROMPT, seeded))
    for neighbours in (1, 5):
        outputs = run(make_engine(), [LONG[i:] for i in range(neighbours)] + [PROMPT], [wild] * neighbours + [seeded])
        assert results(outputs[-1]) == lone
    unseeded = SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True)
    assert alone(PROMPT, unseeded).outputs != alone(PROMPT, unseeded).outputs


def test_logprobs_of_prompt_and_output_are_the_models_own() -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=2, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    model = SlotModel(VOCAB, wildness=0.3)
    output = run(make_engine(model=model, max_extra_rows=8), [LONG], params)[0]
    assert model.most_rows <= 8 + 1
    scores = output.prompt_logprobs
    assert scores is not None
    assert scores[0] is None
    assert [s.token_id for s in scores[1:] if s] == LONG[1:]
    # Scoring prompt and output together gives the output's log-probabilities.
    whole = LONG + list(output.outputs[0].token_ids)
    scored = alone(whole, SamplingParams(max_tokens=0, prompt_logprobs=3))
    assert scored.outputs[0].token_ids == ()
    assert scored.prompt_logprobs is not None
    own = output.outputs[0].logprobs
    assert own is not None
    assert [s for s in scored.prompt_logprobs[len(LONG) :] if s] == list(own)
    assert all(len(s.top) == 3 and s.top[0][1] >= s.top[1][1] >= s.top[2][1] for s in own)
    whole_row = alone(LONG, SamplingParams(max_tokens=1, logprobs=VOCAB)).outputs[0].logprobs
    assert whole_row is not None
    assert sum(math.exp(p) for _, p in whole_row[0].top) == pytest.approx(1)


def test_logit_bias_forbids_and_forces() -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=1, logit_bias={7: 100.0})
    assert set(alone(PROMPT, params).outputs[0].token_ids) == {7}
    banned = SamplingParams(max_tokens=60, ignore_eos=True, logit_bias=dict.fromkeys(range(0, VOCAB, 2), -1000.0))
    assert all(token % 2 for token in alone(PROMPT, banned).outputs[0].token_ids)


def test_metrics_add_up() -> None:
    engine = make_engine(speculation=True)
    output = run(engine, [PROMPT], SamplingParams(n=2, seed=1, max_tokens=50, temperature=0.2, ignore_eos=True))[0]
    m = output.metrics
    assert (m.num_prompt_tokens, m.num_output_tokens, m.longest_output) == (5, 100, 50)
    assert 0 < m.ttft < m.finish_time - m.arrival_time
    assert m.tpot == pytest.approx((m.finish_time - m.first_token_time) / 49)
    assert 0 < m.num_accepted < m.num_drafted


class Interrupted(SlotModel):
    """Raises in the step after `countdown` steps, before or after it has written to its cache."""

    def __init__(self, countdown: int, late: bool) -> None:
        super().__init__(VOCAB, wildness=0.3)
        self.countdown, self.late = countdown, late

    def forward(self, batch):  # type: ignore[no-untyped-def]
        self.countdown -= 1
        if self.countdown == 0 and not self.late:
            raise KeyboardInterrupt
        logits = super().forward(batch)
        if self.countdown == 0:
            raise KeyboardInterrupt
        return logits


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("countdown", [1, 3, 9])
def test_an_interrupted_forward_changes_nothing(countdown: int, late: bool) -> None:
    prompts = [LONG[i : i + 25] for i in range(3)]
    assert_interrupt_changes_nothing(Interrupted(countdown, late), prompts)


def test_an_exception_in_the_books_ends_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    engine.add(PROMPT, SamplingParams(max_tokens=9))
    monkeypatch.setattr(engine.scheduler, "advance", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    assert engine.step() == []
    assert_idle(engine)
    assert run(engine, [PROMPT], SamplingParams(max_tokens=9))[0] is not None


def test_logits_that_are_not_numbers_are_an_error() -> None:
    class Broken(SlotModel):
        def sample(self, logits, params):  # type: ignore[no-untyped-def]
            return type(super().sample(logits, params))(np.full(len(logits), -1, np.int32))

    engine = make_engine(model=Broken(VOCAB))
    request_id = engine.add(PROMPT)
    with pytest.raises(ModelError, match="NaN"):
        engine.step()
    assert engine.cancel(request_id) is not None
    assert_idle(engine)


def test_cancelled_sequences_leave_at_once() -> None:
    engine = make_engine(max_sequences=2)
    ids = [engine.add(PROMPT, SamplingParams(max_tokens=50, ignore_eos=True, n=2, seed=i)) for i in range(3)]
    for _ in range(5):
        engine.step()
    output = engine.cancel(ids[0])
    assert output is not None
    assert output.outputs[0].finish_reason == "cancelled"
    assert 0 < len(output.outputs[0].token_ids) < 50
    assert output.metrics.num_output_tokens == sum(len(c.token_ids) for c in output.outputs)
    engine.scheduler.check()
    assert set(drain(engine)) == {ids[1], ids[2]}
    assert engine.cancel(ids[0]) is None
