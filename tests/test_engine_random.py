"""Random operations on an engine with a tiny cache: the books balance after every step, every request's result equals
its lone run, and nothing is left over. Also on a device that works by itself, with steps launched ahead."""

from typing import Any

import pytest
from engine_tools import VOCAB, FreeDrafts, alone, assert_idle, eager_speculator, make_engine, results
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from overlapped import Overlapped
from slot_model import SlotModel

from hasten.engine.request import SamplingParams

# Prompts share prefixes: pieces of a few long ones, with or without an end of their own.
STEMS = tuple(tuple((7 * i * i + 3 * i + k) % (VOCAB - 1) for i in range(70)) for k in range(3))
prompts = st.builds(
    lambda stem, length, tail: [*stem[:length], *tail],
    st.sampled_from(STEMS),
    st.sampled_from([0, 5, 15, 16, 17, 31, 32, 33, 48, 64, 70]),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4),
)
sampling = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 50),
        "n": st.sampled_from([1, 1, 1, 2, 3]),
        "seed": st.integers(0, 2**64 - 1),
        "temperature": st.sampled_from([0.0, 0.0, 0.5, 1.0]),
        "priority": st.integers(-1, 1),
    },
    optional={
        "min_tokens": st.just(1),
        "top_k": st.integers(1, 6),
        "top_p": st.floats(0.1, 1.0),
        "min_p": st.floats(0.0, 0.5),
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 1.5]),
        "frequency_penalty": st.sampled_from([-0.5, 1.0]),
        "logit_bias": st.just({3: 4.0, 5: -100.0}),
        "stop": st.sampled_from(["ab", ["ba", "dc"], "é", ["gh", "ghi"]]),
        "include_stop_str": st.booleans(),
        "stop_token_ids": st.just((4,)),
        "ignore_eos": st.booleans(),
        "logprobs": st.integers(0, 3),
        "prompt_logprobs": st.integers(0, 2),
    },
)


class Engines(RuleBasedStateMachine):
    """Adds, cancels and steps in any order; speculation, device and sizes are those of the subclass."""

    config: dict[str, Any]
    speculation: bool
    overlapped: bool
    model_drafts: bool

    def __init__(self) -> None:
        super().__init__()
        model = SlotModel(VOCAB, wildness=0.3)
        device = Overlapped(model) if self.overlapped else model
        self.engine = make_engine(**self.config, speculation=self.speculation and not self.model_drafts, model=device)
        if self.model_drafts:
            other = SlotModel(VOCAB, wildness=0.4)
            drafter = Overlapped(other) if self.overlapped else other
            drafter.allocate(self.engine.config.num_blocks, 16, "fp32")
            self.engine.speculator = eager_speculator(drafter=FreeDrafts(drafter, self.engine.config))
        self.asked: dict[str, tuple[list[int], SamplingParams]] = {}
        self.text: dict[tuple[str, int], str] = {}
        self.done: dict[str, Any] = {}

    @rule(prompt=prompts, values=sampling)
    def add(self, prompt: list[int], values: dict[str, Any]) -> None:
        params = SamplingParams(**values)
        self.asked[self.engine.add(prompt, params)] = (prompt, params)

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for delta in self.engine.step():
                key = (delta.request_id, delta.index)
                self.text[key] = self.text.get(key, "") + delta.text
                if delta.output is not None:
                    self.done[delta.request_id] = delta.output
            self.engine.scheduler.check()

    @precondition(lambda self: len(self.asked) > len(self.done))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(set(self.asked) - set(self.done))))
        output = self.engine.cancel(request_id)
        assert output is not None
        prompt, params = self.asked.pop(request_id)
        for so_far, whole in zip(output.outputs, alone(prompt, params).outputs, strict=True):
            assert whole.token_ids[: len(so_far.token_ids)] == so_far.token_ids
            assert whole.text.startswith(so_far.text)
        assert self.engine.cancel(request_id) is None

    @invariant()
    def books_balance(self) -> None:
        pool = self.engine.scheduler.pool
        assert pool.num_free + pool.num_used + pool.num_cached == pool.num_blocks
        self.engine.scheduler.check()

    def teardown(self) -> None:
        while self.engine.num_unfinished:
            self.step(steps=1)
        assert_idle(self.engine)
        assert set(self.done) == set(self.asked)
        for request_id, (prompt, params) in self.asked.items():
            output = self.done[request_id]
            assert results(output) == results(alone(prompt, params))
            for completion in output.outputs:
                assert self.text[request_id, completion.index] == completion.text


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"num_blocks": 9, "max_len": 128, "max_step_tokens": 24, "max_sequences": 4, "max_extra_rows": 8},
    "drafts": {"num_blocks": 9, "max_len": 128, "max_step_tokens": 40, "max_sequences": 5, "max_extra_rows": 16},
    "drafter": {"num_blocks": 9, "max_len": 128, "max_step_tokens": 40, "max_sequences": 5, "max_extra_rows": 16},
    "roomy": {"num_blocks": 40, "max_step_tokens": 64, "max_sequences": 16},
}


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_random_operations(name: str, overlapped: bool) -> None:
    # Speculation waits for every token, so it has little to do with steps ahead; two have both.
    speculation = name in ("drafts", "drafter") or (name == "roomy" and not overlapped)
    members = {
        "config": CONFIGS[name],
        "speculation": speculation,
        "overlapped": overlapped,
        "model_drafts": name == "drafter",
    }
    machine = type(f"Engines_{name}", (Engines,), members)
    case = machine.TestCase
    case.settings = settings(
        max_examples=60,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        phases=(Phase.generate,),  # shrinking takes minutes
    )
    case().runTest()
