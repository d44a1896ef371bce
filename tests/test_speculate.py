"""Speculation changes the time and never the tokens; drafts come from the text; depth follows measurement."""

import itertools
import random
import time

import numpy as np
import pytest
from engine_tools import EOS, VOCAB, eager_speculator, make_engine, results, run
from overlapped import Overlapped
from slot_model import SlotModel

from hasten.engine.request import SamplingParams, Sequence
from hasten.engine.scheduler import Scheduler
from hasten.engine.speculate import NgramDrafter, NgramIndex, Speculator, StepCost, best_depths

PROMPTS = [[(i * i + k) % EOS for i in range(5 + 9 * k)] for k in range(5)]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.4, "seed": 1},
        {"temperature": 1.0, "top_p": 0.6, "seed": 2, "n": 2},
        {"temperature": 0.3, "seed": 3, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "logprobs": 2},
        {"seed": 4, "presence_penalty": -2.0, "min_tokens": 20, "ignore_eos": False},
    ],
)
def test_tokens_are_the_same_on_and_off(params: dict[str, object]) -> None:
    sampling = SamplingParams(**{"max_tokens": 120, "ignore_eos": True, **params})  # type: ignore[arg-type]
    off_model, on_model = SlotModel(VOCAB, wildness=0.3), SlotModel(VOCAB, wildness=0.3)
    off = run(make_engine(model=off_model), PROMPTS, sampling)
    on = run(make_engine(model=on_model, speculation=True), PROMPTS, sampling)
    assert [results(o) for o in on] == [results(o) for o in off]
    assert sum(o.metrics.num_accepted for o in on) > 0
    assert on_model.forwards < off_model.forwards


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_prompts_of_numpy_numbers(dtype: type) -> None:
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    prompts = [list(np.array(prompt, dtype)) for prompt in PROMPTS]
    engines = [make_engine(model=SlotModel(VOCAB, wildness=0.3), speculation=True) for _ in range(2)]
    got, expected = run(engines[0], prompts, sampling), run(engines[1], PROMPTS, sampling)
    assert [results(output) for output in got] == [results(output) for output in expected]
    assert all(type(token) is int for output in got for token in output.prompt_token_ids)


def test_index_finds_the_longest_and_latest_match() -> None:
    index = NgramIndex()
    assert index.propose([1, 2, 3], 4) == []
    assert index.propose([1, 2, 3, 9, 9, 2, 3], 2) == [9, 9]
    assert index.propose([1, 2, 3, 9, 9, 2, 3, 8, 2, 3], 1) == [8]  # later wins
    assert index.propose([1, 2, 3, 9, 9, 2, 3, 8, 2, 3, 5, 1, 2, 3], 1) == [9]  # longer wins
    assert NgramIndex().propose([4, 5, 4, 5], 5) == [4, 5, 4, 5, 4]  # a repetition is continued
    assert NgramIndex().propose([7, 7, 7], 3) == [7, 7, 7]


@pytest.mark.parametrize("num_prompt", [0, 1, 2, 3, 4, 5, 6, 200])
@pytest.mark.parametrize("vocab", [2, 4, 1 << 18])
def test_index_equals_a_search(num_prompt: int, vocab: int) -> None:
    """Of a prompt, indexed at once, and of what follows token by token."""
    rng = random.Random(1)
    some = [rng.randrange(vocab) for _ in range(4)]
    tokens = rng.choices(some, k=num_prompt)
    index = NgramIndex()
    index.extend(tokens)
    for _ in range(200):
        tokens.append(rng.choice(some))
        expected: list[int] = []
        for size in (4, 3, 2):
            ends = range(size, len(tokens))
            starts = [i for i in ends if tokens[i - size : i] == tokens[-size:]]
            if starts:
                period = tokens[starts[-1] :]
                expected = [period[i % len(period)] for i in range(6)]
                break
        assert index.propose(tokens, 6) == expected


def test_best_depth_weighs_chance_against_cost() -> None:
    assert best_depths([0.9], 0.0, 8) == [8]
    assert best_depths([0.5], 0.6, 8) == [0]
    assert best_depths([0.05], 0.1, 8) == [0]
    assert best_depths([0.6], 0.1, 8) == [3]
    depths = [best_depths([0.8], cost / 20, 8)[0] for cost in range(21)]
    assert depths == sorted(depths, reverse=True)


@pytest.mark.parametrize("drafting", [0.0, 0.1, 0.4])
@pytest.mark.parametrize(("each", "waiting"), [(0.0, 0.3), (0.02, 0.0), (0.05, 0.6), (0.1, 0.1)])
def test_best_depths_of_several_are_those_of_a_search(each: float, waiting: float, drafting: float) -> None:
    rng = random.Random(3)
    some = 0
    for _ in range(40):
        chances = [rng.choice((0.0, 1.0, rng.random())) for _ in range(3)]

        def rate(depths: tuple[int, ...], chances: list[float] = chances) -> float:
            right = sum(chance**i for chance, depth in zip(chances, depths, strict=True) for i in range(1, depth + 1))
            lost = (waiting if any(depths) else 0) + drafting * max(depths)
            return (3 + right) / (1 + lost + each * sum(depths))

        best = max(map(rate, itertools.product(range(4), repeat=3)))
        best = best if waiting == 0 or best > 3.3 else 3
        found = tuple(best_depths(chances, each, 3, waiting, drafting))
        assert rate(found) == pytest.approx(best)
        some += any(found)
    assert 0 < some <= 40


def test_one_lucky_sequence_does_not_make_all_wait() -> None:
    assert best_depths([0.95], 0.01, 8, 1.0) == [8]
    assert best_depths([0.95] + [0.0] * 15, 0.01, 8, 1.0) == [0] * 16
    assert best_depths([0.95] * 15 + [0.0], 0.01, 8, 1.0)[15] == 0 < best_depths([0.95] * 15 + [0.0], 0.01, 8, 1.0)[0]


def test_cost_is_fitted_and_follows_change() -> None:
    cost = StepCost()
    rng = random.Random(0)
    assert 0 < cost.of_one_more(1) < 1
    for _ in range(300):
        n = rng.choice((1, 1, 3, 5))
        cost.record(n, (1.0 + 0.25 * n) * rng.uniform(0.95, 1.05))
    assert cost.of_one_more(1) == pytest.approx(0.25 / 1.25, rel=0.15)
    for _ in range(300):
        n = rng.choice((1, 3))
        cost.record(n, 1.0 * n)
    assert cost.of_one_more(1) == pytest.approx(1.0, rel=0.1)


def test_depth_falls_to_nothing_where_it_loses() -> None:
    """Text that never repeats what the index says, and steps that cost as much a token: only the probes are left."""
    engine = make_engine(model=SlotModel(VOCAB, wildness=50.0), num_blocks=64, max_len=1024)
    engine.speculator = Speculator()
    engine.speculator.cost = type("Linear", (StepCost,), {"of_one_more": lambda self, n: 1.0 / n})()
    output = run(engine, [PROMPTS[0]], SamplingParams(max_tokens=600, ignore_eos=True))[0]
    assert output.metrics.num_drafted < 600 / 32 + 3
    assert eager_speculator().cost.of_one_more(1) == 0


def test_luck_of_lookups_is_known_without_drafting() -> None:
    """What a lookup would have said is compared with what came, also while tokens are on their way."""
    index, other = NgramIndex(), NgramIndex()
    tokens, rng = [1, 2, 3, 4], random.Random(2)
    for _ in range(10):
        index.extend([*tokens, -1])  # a promise is not a token
        tokens += tokens[-4:]
    assert index.luck > 0.8
    noise: list[int] = []
    for _ in range(60):
        noise.append(rng.randrange(1000))
        other.extend(noise)
    assert other.luck < 0.01
    prompt = NgramIndex()
    prompt.extend([5, 6] * 40)
    assert prompt.luck == 0.5


def test_first_runs_do_not_count_and_lasting_change_does() -> None:
    cost = StepCost()
    cost.record(4, 2.0)  # compiles
    for _ in range(5):
        cost.record(4, 0.01)
    cost.record(4, 0.5)  # captures
    assert cost.seconds(4) == pytest.approx(0.01)
    for _ in range(200):
        cost.record(4, 0.1)
    assert cost.seconds(4) == pytest.approx(0.1, rel=0.05)
    other = StepCost()
    other.record(2, 1.0, most=0.04)
    assert other.seconds(2) is None


def test_waiting_is_weighed() -> None:
    """On a device that works by itself: a step with drafts costs what waiting loses, whatever their number."""
    speculator = Speculator()
    for _ in range(50):
        speculator.record(1, 0.001, waited=False)
    assert speculator._costs(1) == (0.0, pytest.approx(0.1), 0.0)
    for count in (2, 5) * 50:
        speculator.record(count, 0.0018 + 0.0001 * count, waited=True)
    waiting, each, _ = speculator._costs(1)
    assert waiting == pytest.approx(0.9, rel=0.05)
    assert each == pytest.approx(0.1, rel=0.05)
    assert best_depths([0.4], each, 8, waiting) == [0]
    assert best_depths([0.95], each, 8, waiting) == [8]


class Slow(NgramDrafter):
    """To ask it takes 2 ms, and so does a draft."""

    asked = 0

    def rate(self, sequence: Sequence) -> float:
        self.asked += 1
        time.sleep(0.002)
        return 0.0 * super().rate(sequence)

    def propose(self, wanted: list[tuple[Sequence, int]], scheduler: Scheduler, usual: float | None) -> None:
        time.sleep(0.002)
        super().propose(wanted, scheduler, usual)


@pytest.mark.parametrize("idle", [0.0, 1.0])
def test_asking_whether_to_draft_takes_a_hundredth_of_the_time(idle: float) -> None:
    """2 ms of 40 steps of 5 ms, or a little more; at every step where the host has nothing else to do."""
    drafter = Slow()
    engine = make_engine(model=SlotModel(VOCAB), num_blocks=64, max_len=1024)
    engine.speculator = Speculator(drafter)
    engine.speculator._idle = idle
    for _ in range(50):
        engine.speculator.record(1, 0.005, waited=False)
    engine.speculator.cost.record = lambda *_: None  # type: ignore[method-assign]
    run(engine, [PROMPTS[0]], SamplingParams(max_tokens=400, ignore_eos=True))
    assert drafter.asked >= 395 if idle else 400 / 50 <= drafter.asked <= 400 / 40 + 3


def test_who_joins_is_asked_about_at_once() -> None:
    speculator = Speculator(Slow())
    engine = make_engine(model=SlotModel(VOCAB), num_blocks=64, max_len=1024)
    engine.speculator = speculator
    for _ in range(50):
        speculator.record(1, 0.002, waited=False)
    speculator.cost.record = lambda *_: None  # type: ignore[method-assign]
    engine.add(PROMPTS[0], SamplingParams(max_tokens=200, ignore_eos=True))
    while speculator._next_look < speculator._num_steps + 50:
        engine.step()
    engine.add(PROMPTS[1], SamplingParams(max_tokens=200, ignore_eos=True))
    for _ in range(3):
        engine.step()
    assert all(sequence.ngrams is not None for sequence in engine.scheduler.running)
    assert len(engine.scheduler.running) == 2


def test_what_drafts_take_of_the_host_is_part_of_a_step() -> None:
    drafter, taken = Slow(), []
    drafter.rate = lambda sequence: 0.9  # type: ignore[method-assign]
    engine = make_engine(model=SlotModel(VOCAB), num_blocks=64, max_len=1024)
    engine.speculator = Speculator(drafter)
    engine.speculator.record = lambda num_tokens, seconds, *_: taken.append(seconds)  # type: ignore[method-assign]
    run(engine, [PROMPTS[0]], SamplingParams(max_tokens=30, ignore_eos=True))
    assert min(taken[:-1]) > 0.002  # the last has no room for drafts


def test_what_a_drafter_reckons_itself_is_not_counted_twice() -> None:
    drafter = Slow()
    drafter.rate = lambda sequence: 0.9  # type: ignore[method-assign]
    drafter.seconds = lambda num_sequences: 0.002  # type: ignore[method-assign]
    engine = make_engine(model=SlotModel(VOCAB), num_blocks=64, max_len=1024)
    engine.speculator = speculator = Speculator(drafter)
    speculator.cost.seconds = lambda num_tokens: 0.1  # type: ignore[method-assign]
    taken: list[float] = []
    speculator.cost.record = lambda num_tokens, seconds: taken.append(seconds)  # type: ignore[method-assign,misc,assignment]
    run(engine, [PROMPTS[0]], SamplingParams(max_tokens=30, ignore_eos=True))
    assert 0 < sorted(taken)[len(taken) // 2] < 0.001


def test_steps_launched_ahead_are_timed_again() -> None:
    """The first may have been slow; while drafts are waited for there are none. A hiccup does not count."""
    speculator = Speculator()
    speculator.overlaps = True
    sequence = type("Decodes", (), {"num_computed": 3, "tokens": [0] * 4, "num_output": 2, "limit": 900})
    sequence.ngrams = type("Lucky", (), {"luck": 0.4, "extend": lambda self, tokens: None})()
    drafted = []
    for step in range(400):
        slow = 5.0 if step < 12 else 1.0
        rests = speculator.rests([sequence])  # type: ignore[list-item]
        if not rests:
            speculator._num_steps += 1
            assert speculator._depths([sequence])[0][1] > 0  # type: ignore[list-item]
        speculator.record(1, slow * (0.001 if rests else 0.002) * (30 if step in (20, 300) else 1), waited=not rests)
        drafted.append(not rests)
    assert any(drafted[8:100])
    assert not any(drafted[200:])
    assert speculator.cost.seconds(1) == pytest.approx(0.001)


def test_after_a_pause_the_last_tokens_are_indexed() -> None:
    index, tokens = NgramIndex(), [5, 6] * 40
    index.extend(tokens[:4])
    index.extend([*tokens[:4], *range(100, 130), 1, 2, 3, 4])
    assert index.propose([*tokens[:4], *range(100, 130), 1, 2, 3, 4, 1, 2], 2) == [3, 4]
    assert index.propose([*tokens[:4], *range(100, 130), 1, 2, 3, 4, 1, 2, 100, 101], 2) == []


def test_no_draft_before_it_is_known_what_waiting_costs() -> None:
    """On a device that works by itself the first steps are launched ahead and timed, all together."""
    speculator = Speculator()
    engine = make_engine(model=Overlapped(SlotModel(VOCAB)), num_blocks=64, max_len=1024, speculator=speculator)
    engine.add(PROMPTS[0] * 20, SamplingParams(max_tokens=40, ignore_eos=True))
    while speculator.cost.seconds(1) is None:
        assert [sequence.drafts for sequence in engine.scheduler.running if sequence.drafts] == []
        engine.step()
    assert 8 <= engine.scheduler.running[0].num_output <= 12
    for seconds in (0.001, 0.009) * 200:  # the host is late for one, and the next takes no time
        speculator.record(1, seconds, waited=False)
    assert speculator.cost.seconds(1) == pytest.approx(0.005, rel=0.05)
