"""Blocks, order of service and step budgets, without a model; and batches against their slow construction."""

import random
from dataclasses import fields

import numpy as np
import pytest
from engine_tools import VOCAB, make_engine

from hasten.backends.base import DeviceMemory
from hasten.engine.batch import BatchBuilder
from hasten.engine.blocks import BlockPool, block_hash
from hasten.engine.capacity import plan_cache
from hasten.engine.request import Request, SamplingParams, Sequence
from hasten.engine.scheduler import Scheduler, Step
from hasten.errors import ResourceError


def sequence(num_tokens: int, arrival: int = 0, limit: int = 1000, **params: object) -> Sequence:
    request = Request(str(arrival), list(range(num_tokens)), SamplingParams(**params), None)  # type: ignore[arg-type]
    request.sequences.append(Sequence(request, 0, arrival, 0, limit))
    return request.sequences[0]


def scheduler(num_blocks: int, max_tokens: int = 64, max_sequences: int = 8, extra_rows: int = 16) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, 16), max_tokens, max_sequences, extra_rows)


def complete(plan: Scheduler, step: Step) -> None:
    """What the engine does after a step: everything ran, one token is sampled where the end was reached."""
    for s, count in zip(step.sequences, step.query_lens, strict=True):
        end = s.num_computed + count
        if end >= len(s.tokens):
            s.tokens.append(1)
        plan.advance(s, end)
    plan.check()


def test_pool_random_operations_balance() -> None:
    rng = random.Random(0)
    pool = BlockPool(12, 16)
    names = [block_hash(b"", [i] * 16) for i in range(20)]
    held: list[list[int]] = []
    for _ in range(3000):
        action = rng.random()
        if action < 0.4:
            block = pool.allocate()
            assert (block is None) == (pool.num_used == pool.num_blocks and block is None)
            if block is not None:
                held.append([block])
                if rng.random() < 0.7:
                    pool.publish(block, rng.choice(names))
        elif action < 0.6:
            found = pool.match([rng.choice(names)])
            if found:
                held.append(found)
        elif held:
            pool.release(held.pop(rng.randrange(len(held))))
        pool.check(held)
        assert pool.num_free + pool.num_used + pool.num_cached == pool.num_blocks


def test_pool_evicts_the_least_recently_used_and_tails_before_heads() -> None:
    pool = BlockPool(4, 16)
    names = [block_hash(b"", [i] * 16) for i in range(4)]
    blocks = [pool.allocate() for _ in range(4)]
    assert None not in blocks
    assert pool.allocate() is None
    for block, name in zip(blocks, names, strict=True):
        pool.publish(block, name)  # type: ignore[arg-type]
    pool.release(blocks[:2])  # type: ignore[arg-type]
    pool.release(blocks[2:])  # type: ignore[arg-type]
    assert pool.match([names[0]]) == [blocks[0]]  # in use again
    assert [pool.allocate(), pool.allocate(), pool.allocate()] == [blocks[1], blocks[3], blocks[2]]
    assert pool.match([names[1]]) == []
    assert pool.num_used == 4


def test_block_hash_names_the_whole_prefix() -> None:
    one, two = block_hash(b"", range(16)), block_hash(b"", range(1, 17))
    assert len(one) == 16
    assert block_hash(one, range(16)) != block_hash(two, range(16)) != one
    assert block_hash(b"", list(range(16))) == one


def test_decodes_come_before_the_chunks_of_a_prompt() -> None:
    plan = scheduler(64, max_tokens=20)
    for arrival in range(3):
        plan.add(sequence(4, arrival))
    complete(plan, plan.schedule())
    plan.add(sequence(50, 3, priority=-1))  # first in order of service
    counts = []
    for _ in range(4):
        step = plan.schedule()
        counts.append(dict(zip((s.key[1] for s in step.sequences), step.query_lens, strict=True)))
        complete(plan, step)
    assert counts == [{3: chunk, 0: 1, 1: 1, 2: 1} for chunk in (17, 17, 16, 1)]


def test_the_last_in_order_of_service_is_preempted_and_comes_back_first() -> None:
    plan = scheduler(7, max_tokens=200)
    sequences = [sequence(31, i) for i in range(3)]
    for s in sequences:
        s.tokens = [token + 100 * s.key[1] for token in s.tokens]  # no shared prefix
        plan.add(s)
    for _ in range(3):  # the third step needs a third block each, and there are seven
        complete(plan, plan.schedule())
    assert plan.running == sequences[:2]
    assert sequences[2].blocks == []
    assert sequences[2].request.metrics.num_preemptions == 1
    plan.add(late := sequence(5, 9))
    complete(plan, plan.schedule())
    assert plan.pool.num_available == 1
    assert late not in plan.running  # it would fit, but nobody overtakes the one that waits
    plan.remove(sequences[0])
    complete(plan, plan.schedule())
    assert plan.running == [sequences[1], sequences[2], late]


def test_a_higher_priority_pushes_out_a_lower_one_but_not_its_peers() -> None:
    plan = scheduler(8, max_sequences=2)
    low, peer = sequence(20, 0, priority=5), sequence(20, 1, priority=1)
    plan.add(low)
    plan.add(peer)
    complete(plan, plan.schedule())
    plan.add(urgent := sequence(20, 2, priority=1))
    complete(plan, plan.schedule())
    assert plan.running == [peer, urgent]
    plan.add(also := sequence(20, 3, priority=1))
    complete(plan, plan.schedule())
    assert also not in plan.running


def test_a_higher_priority_does_not_wait_for_a_lower_ones_prompt() -> None:
    plan = scheduler(64, max_tokens=20)
    plan.add(sequence(400, 0, priority=1))
    complete(plan, plan.schedule())
    plan.add(sequence(30, 1, priority=1))  # waits its turn
    plan.add(sequence(30, 2, priority=0))
    step = plan.schedule()
    assert [(s.key[1], count) for s, count in zip(step.sequences, step.query_lens, strict=True)] == [(2, 14), (0, 6)]
    assert plan.num_waiting == 1


def with_prompt(tokens: list[int], arrival: int, limit: int = 1000) -> Sequence:
    found = sequence(len(tokens), arrival, limit)
    found.tokens[:] = found.request.prompt_ids[:] = tokens
    return found


def test_one_that_waits_for_a_coming_block_holds_up_nobody() -> None:
    plan = scheduler(64, max_tokens=64)
    shared = list(range(100))
    plan.add(with_prompt([*shared, 1], 0))
    complete(plan, plan.schedule())  # 64 of its tokens: four blocks
    plan.add(with_prompt([*shared, 2], 1))  # its fifth block is being computed
    plan.add(with_prompt([7] * 20, 2))
    step = plan.schedule()
    assert [s.key[1] for s in step.sequences] == [0, 2]
    complete(plan, step)
    step = plan.schedule()
    assert [s.key[1] for s in step.sequences] == [0, 1, 2]
    assert step.query_lens[1] == 101 - 96, "what was shared was computed again"


@pytest.mark.parametrize(("num_blocks", "max_sequences"), [(64, 2), (14, 8)])
def test_those_behind_one_that_waits_take_neither_its_place_nor_its_blocks(num_blocks: int, max_sequences: int) -> None:
    plan = scheduler(num_blocks, max_tokens=64, max_sequences=max_sequences)
    shared = list(range(100))
    plan.add(with_prompt([*shared, 1], 0, limit=110))
    complete(plan, plan.schedule())
    plan.add(with_prompt([*shared, 2], 1, limit=110))
    plan.add(with_prompt([7] * 20, 2))
    assert [s.key[1] for s in plan.schedule().sequences] == [0]


def test_drafts_never_preempt_and_respect_the_budget() -> None:
    plan = scheduler(4, extra_rows=12)
    one, other = sequence(29, 0), sequence(29, 1)
    other.tokens = [token + 100 for token in other.tokens]
    plan.add(one)
    plan.add(other)
    complete(plan, plan.schedule())
    assert (len(one.tokens), len(other.tokens), plan.pool.num_available) == (30, 30, 0)
    one.drafts, other.drafts = [1] * 9, [1] * 9
    step = plan.schedule()
    assert (one.drafts, other.drafts) == ([1, 1], [1, 1])  # what their blocks still hold
    assert (step.sequences, step.query_lens) == ([one, other], [3, 3])
    roomy = scheduler(64, max_tokens=9, extra_rows=5)
    again = [sequence(3, i) for i in range(3)]
    for s in again:
        roomy.add(s)
    complete(roomy, roomy.schedule())
    for s in again:
        s.drafts = [1] * 4
    assert roomy.schedule().query_lens == [5, 2, 1]  # five rows for drafts in all


def test_a_copy_that_was_not_made_is_dropped_with_its_sequence() -> None:
    plan = scheduler(8)
    first = sequence(20, n=2)
    second = Sequence(first.request, 1, 0, 0, 1000)
    first.request.sequences.append(second)
    plan.add(first)
    plan.add(second)
    complete(plan, plan.schedule())
    assert plan.schedule().copies == [(first.blocks[1], second.blocks[1])]
    assert plan.schedule().copies == [(first.blocks[1], second.blocks[1])]  # until it is confirmed
    plan.remove(second)
    assert plan.schedule().copies == []


def test_scored_prompts_share_the_rows_of_a_step() -> None:
    plan = scheduler(64, extra_rows=10)
    for arrival in range(2):
        plan.add(sequence(30, arrival, prompt_logprobs=0))
    step = plan.schedule()
    assert step.query_lens == [10]


@pytest.mark.parametrize("seed", range(5))
def test_decode_batches_equal_the_general_construction(seed: int) -> None:
    """The short path, with tables kept between steps, gives the arrays that a fresh builder makes the long way."""
    rng = random.Random(seed)
    engine = make_engine(num_blocks=20, max_sequences=6, max_step_tokens=24)
    kept, checked = engine._batches, 0

    def build(step: Step):  # type: ignore[no-untyped-def]
        nonlocal checked
        fast = type(kept).build(kept, step)
        fresh = BatchBuilder(16, 6, 64)
        slow = fresh.general(step)
        for field in fields(slow):
            a, b = getattr(fast, field.name), getattr(slow, field.name)
            if field.name == "sampled_from":
                assert a is b is None
            elif field.name == "block_tables":
                for row, context in enumerate(slow.context_lens):
                    assert (a[row, : -(-context // 16)] == b[row, : -(-context // 16)]).all()
            else:
                np.testing.assert_array_equal(a, b)
                assert a.dtype == b.dtype == np.int32
        checked += 1
        return fast

    kept.build = build  # type: ignore[method-assign]
    for _ in range(24):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice((1, 5, 16, 40)))]
        num, priority = rng.choice((1, 1, 2)), rng.randrange(3)
        params = SamplingParams(max_tokens=rng.randrange(1, 40), n=num, priority=priority, ignore_eos=True)
        engine.add(prompt, params)
        for _ in range(rng.randrange(6)):
            engine.step()
    while engine.num_unfinished:
        engine.step()
    assert checked > 50


def test_cache_plan() -> None:
    def plan(block_bytes: int, max_position: int, max_len: int | None, memory: float | None, free: int):  # type: ignore[no-untyped-def]
        return plan_cache(block_bytes, 32, max_position, max_len, memory, DeviceMemory(free, free))

    assert plan(1000, 1024, None, None, 10**9) == (4 * 32, 1024)  # four sequences of the model's length
    assert plan(1000, 131072, None, None, 10**9) == (4096, 131072)  # one of full length
    assert plan(1000, 131072, None, None, 10**6) == (900, 900 * 32)  # as far as it fits
    assert plan(1000, 131072, 100, None, 10**9) == (13, 100)
    assert plan(1000, 1024, None, 50_000, 10**9) == (50, 1024)
    with pytest.raises(ResourceError, match=r"needs 4\.1 GB for 131072 tokens, 1\.0 GB free: lower max_len"):
        plan(1_000_000, 131072, 131072, None, 10**9)
    with pytest.raises(ResourceError, match=r"memory allows 10\.00 MB.*raise memory or use kv_cache int8"):
        plan(10**6, 1024, 1024, 10**7, 10**9)
    with pytest.raises(ResourceError, match="max_len is 2000, expected 1 to 1024"):
        plan(1000, 1024, 2000, None, 10**9)
    with pytest.raises(ResourceError, match="are free: lower memory"):
        plan(1000, 1024, None, 10**10, 10**9)
    with pytest.raises(ResourceError, match=r"memory is 1\.5, expected a share"):
        plan(1000, 1024, None, 1.5, 10**9)


def test_cache_plan_on_a_device_of_its_own() -> None:
    """All that is left of the share: 0.9 of 1000 MB, less 300 MB of weights and 100 MB for steps."""
    gpu = DeviceMemory(total=10**9, free=7 * 10**8, reserved=10**8, shared=False)
    assert plan_cache(10**6, 32, 1 << 20, None, None, gpu) == (500, 500 * 32)
    assert plan_cache(10**6, 32, 1 << 20, None, 0.5, gpu) == (100, 100 * 32)
    assert plan_cache(10**6, 32, 320, None, None, gpu, max_sequences=8) == (2 * 8 * 10, 320)  # more is of no use
    with pytest.raises(
        ResourceError, match=r"left of 0\.5 of the device's 1\.0 GB \(0\.3 GB are taken and 0\.1 GB kept"
    ):
        plan_cache(10**6, 32, 1 << 20, 1 << 20, 0.5, gpu)
    with pytest.raises(ResourceError, match=r"0\.6 GB are free: lower memory"):
        plan_cache(10**6, 32, 1024, None, 65 * 10**7, gpu)
