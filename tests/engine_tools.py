"""What the engine's tests share: an engine over the slot model, a run to the end, and decoders of one letter a
token."""

from collections.abc import Sequence
from typing import Any

import pytest
from slot_model import SlotModel

from hasten.backends.base import Backend
from hasten.engine.config import EngineConfig
from hasten.engine.draft_model import ModelDrafter
from hasten.engine.engine import Engine
from hasten.engine.request import RequestOutput, SamplingParams
from hasten.engine.speculate import Drafter, Speculator, StepCost

VOCAB = 12
EOS = 11


class Letters:
    """A TokenDecoder: token 0 is "a", 1 is "b"; pairs of 9 make one character, so that text can be incomplete."""

    def __init__(self, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self.half = False

    def push(self, token: int) -> str:
        if token == 9:
            self.half = not self.half
            return "" if self.half else "é"
        text = ("?" if self.half else "") + chr(97 + token)
        self.half = False
        return text

    def finish(self) -> str:
        text, self.half = "?" if self.half else "", False
        return text


class Free(StepCost):
    """Drafts cost nothing: always draft, so that a test does not depend on the clock."""

    def of_one_more(self, num_tokens: int) -> float:
        return 0.0

    def seconds(self, num_tokens: int) -> float | None:
        return 1.0


class Unmeasured(StepCost):
    """Learns nothing from the clock."""

    def record(self, num_tokens: int, seconds: float, most: float = 0.0) -> None:
        pass


class FreeDrafts(ModelDrafter):
    """Likewise for a model that drafts."""

    def seconds(self, num_sequences: int) -> float | None:
        return 0.0


def eager_speculator(depth: int = 5, drafter: Drafter | None = None) -> Speculator:
    speculator = Speculator(drafter, max_depth=depth)
    speculator.cost, speculator.waited = Free(), Unmeasured()
    return speculator


def make_engine(
    num_blocks: int = 64,
    speculation: bool = False,
    model: Backend | None = None,
    speculator: Speculator | None = None,
    **config: Any,
) -> Engine:
    model = model or SlotModel(VOCAB, wildness=0.3)
    model.allocate(num_blocks, 16, "fp32")
    sizes = {"vocab_size": VOCAB, "num_blocks": num_blocks, "block_size": 16, "max_len": 256, "eos_token_ids": (EOS,)}
    return Engine(
        model,
        EngineConfig(**{**sizes, **config}),
        new_decoder=Letters,
        speculator=eager_speculator() if speculation else speculator,
    )


def run(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[RequestOutput]:
    """Outputs in order; checks the books after every step and that nothing is left over."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    ids = [engine.add(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
    done = drain(engine)
    return [done[i] for i in ids]


def drain(engine: Engine) -> dict[str, RequestOutput]:
    done = {}
    while engine.num_unfinished:
        for delta in engine.step():
            if delta.output is not None:
                done[delta.request_id] = delta.output
        engine.scheduler.check()
    assert_idle(engine)
    return done


def assert_idle(engine: Engine) -> None:
    assert engine.step() == []
    assert engine.scheduler.running == []
    assert engine.scheduler.num_waiting == 0
    assert engine.scheduler.pool.num_used == 0
    engine.scheduler.check()


def alone(prompt: Sequence[int], params: SamplingParams) -> RequestOutput:
    """The request by itself, unhurried: no neighbours, no speculation, one large step, plenty of blocks."""
    return run(make_engine(), [prompt], params)[0]


def results(output: RequestOutput) -> list[tuple[Any, ...]]:
    """What must not depend on company."""
    return [
        (
            c.token_ids,
            c.text,
            c.finish_reason,
            c.stop_reason,
            [(p.token_id, p.logprob, p.top) for p in c.logprobs or ()],
        )
        for c in output.outputs
    ] + [output.prompt_logprobs]


def assert_interrupt_changes_nothing(model: Backend, prompts: Sequence[list[int]]) -> None:
    """`model` interrupts one step of three requests. One is cancelled then; the others get what they get alone."""
    engine = make_engine(model=model, num_blocks=12, max_step_tokens=24)
    params = SamplingParams(max_tokens=30, n=2, temperature=0.5, seed=4, ignore_eos=True)
    ids = [engine.add(prompt, params) for prompt in prompts]
    with pytest.raises(KeyboardInterrupt):
        drain(engine)
    assert engine.cancel(ids[1]) is not None
    engine.scheduler.check()
    done = drain(engine)
    for i in (0, 2):
        assert results(done[ids[i]]) == results(alone(prompts[i], params))
