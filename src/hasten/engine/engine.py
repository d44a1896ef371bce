"""The loop: schedule -> forward -> sample -> update, over a Backend and a vocabulary of numbers.

Knows tokens and, through a decoder it is handed, their text; no files, prompts or threads. step() is the only thing
that drives it, so whoever owns the engine (LLM, a server) decides when it runs. Not thread-safe: one owner.

On a device that works by itself (Backend.overlaps), the step after the one that runs is launched before its result is
waited for, as if every sequence in it went on: each has one token more, whose number the device fills in. Where the
result then ends a sequence, the token that is on its way for it is dropped. Its blocks may have new owners by then: the
device does things in order, so theirs are written later.
"""

import math
import operator
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from hasten.backends.base import Backend, Batch, Pending, Sampled, SamplingBatch
from hasten.engine.batch import BatchBuilder, wanted_positions
from hasten.engine.blocks import BlockPool
from hasten.engine.config import EngineConfig
from hasten.engine.request import Delta, FinishReason, Request, RequestOutput, SamplingParams, Sequence, TokenLogprob
from hasten.engine.sampling import DecodeSampling, greedy_batch, prepare, sampling_batch
from hasten.engine.scheduler import Scheduler, Step
from hasten.engine.speculate import Speculator
from hasten.engine.text import TextStream, TokenDecoder
from hasten.errors import ModelError, RequestError


@dataclass(slots=True)
class _Flight:
    """A step that the device was given. num_rows: of each sequence, the rows that score its prompt and those that
    sample, or _ENDS where its last token runs and none is to be sampled."""

    step: Step
    num_rows: list[tuple[int, int]]
    pending: Pending | None
    num_tokens: int
    is_ahead: bool = False  # it was launched before the result of the one before was there


_ENDS = -1


class Engine:
    """Requests in, tokens out. `defaults` fill sampling parameters that a request does not give."""

    def __init__(
        self,
        backend: Backend,
        config: EngineConfig,
        *,
        new_decoder: Callable[[Seq[int], bool], TokenDecoder] | None = None,
        defaults: Mapping[str, object] | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self.config = config
        self.speculator = speculator
        if speculator is not None:
            speculator.overlaps = backend.overlaps
        self._backend = backend
        self._new_decoder = new_decoder
        self._defaults = dict(defaults or {})
        pool = BlockPool(config.num_blocks, config.block_size)
        self.scheduler = Scheduler(pool, config.max_step_tokens, config.max_sequences, config.max_extra_rows)
        self._max_len = min(config.max_len, config.num_blocks * config.block_size)
        self._batches = BatchBuilder(config.block_size, config.max_sequences, config.max_blocks)
        self._eos_token_ids = [token for token in config.eos_token_ids if token < config.vocab_size]
        self._requests: dict[str, Request] = {}
        self._num_added = 0
        self._sampling = DecodeSampling()
        self._flight: _Flight | None = None  # on the device; its tokens are promised to their sequences
        self._ahead: _Flight | None = None  # given to the device after that; nothing is promised yet
        self._last_settled = 0.0  # or when the first request came after none
        self._cut_short = False  # an exception in a launch: what the device has sampled last is not known
        self._inconsistent = False  # an exception in the midst of the books

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def add(self, prompt_ids: Seq[int], params: SamplingParams | None = None, prompt: str | None = None) -> str:
        """Queue one request; its id. Raises RequestError where it can never be served, and leaves nothing behind."""
        if params is not None and not isinstance(params, SamplingParams):
            raise RequestError(f"params is {params!r:.80}, expected SamplingParams")
        if self._inconsistent:
            self.abort()
        params = (params or SamplingParams()).with_defaults(self._defaults)
        limit = self._check(prompt_ids, params)
        arrival = self._num_added
        self._num_added += 1
        request = Request(str(arrival), [operator.index(token) for token in prompt_ids], params, prompt)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        stop_tokens = frozenset(params.stop_token_ids).union(() if params.ignore_eos else self._eos_token_ids)
        for index in range(params.n):
            sequence = Sequence(request, index, arrival, seed, limit)
            sequence.stop_tokens = stop_tokens
            prepare(sequence)
            if self._new_decoder is not None:
                decoder = self._new_decoder(request.prompt_ids, params.skip_special_tokens)
                sequence.text = TextStream(decoder, params.stop_strings, params.include_stop_str)
            request.sequences.append(sequence)
        if not self._requests:
            self._last_settled = time.perf_counter()
        self._inconsistent = True
        self._requests[request.id] = request
        for sequence in request.sequences:
            self.scheduler.add(sequence)
        self._inconsistent = False
        return request.id

    def cancel(self, request_id: str) -> RequestOutput | None:
        """End a request now; what it has so far. None where it is not running any more."""
        if self._inconsistent:
            self.abort()
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self._end(sequence, "cancelled")
        request.metrics.finish_time = time.perf_counter()
        return request.output()

    def abort(self) -> None:
        """End every request and forget the cache: the way back from an exception in the midst of a step."""
        self._flight = self._ahead = None
        self._requests.clear()
        self.scheduler.clear()
        self._inconsistent = False

    def step(self) -> list[Delta]:
        """Run one step and return what it added, at most one Delta a sequence. [] when there is nothing to do.

        An exception of the backend (KeyboardInterrupt included) leaves the requests as they were before the step; one
        in the midst of the engine's own books ends every request at the next call.
        """
        if self._inconsistent:
            self.abort()
        if not self._requests:
            self._flight = self._ahead = None
            return []
        if self._flight is None:
            if self.speculator is not None:
                self.speculator.draft(self.scheduler)
            flight = self._launch()
            assert flight is not None, "requests are waiting that can never be scheduled"
            self._promise(flight)
            self._flight = flight
            self._inconsistent = self._cut_short = False
        if self._ahead is None and self._may_run_ahead(self._flight):
            self._ahead = self._launch()
            if self._ahead is not None:
                self._ahead.is_ahead = True
            self._cut_short = False
        deltas = self._settle(self._flight)
        self._flight, self._ahead = self._ahead, None
        if self._flight is not None:
            self._promise(self._flight)
        self._inconsistent = False
        return deltas

    def _may_run_ahead(self, flight: _Flight) -> bool:
        """Whether the step after this one can be made without its tokens."""
        if not self._backend.overlaps or self._cut_short:
            return False
        if not flight.step.decodes and any(scored or sampled > 1 for scored, sampled in flight.num_rows):
            return False
        if any(sequence.seen is not None for sequence in flight.step.sequences):
            return False
        return self.speculator is None or self.speculator.rests(self.scheduler.running)

    def _launch(self) -> _Flight | None:
        """Schedule a step and give it to the device. None where nothing can run. The caller clears _cut_short when it
        has the flight."""
        self._inconsistent = True
        step = self.scheduler.schedule()
        if not step.sequences:
            self._inconsistent = False
            return None
        batch = self._batches.build(step)
        params = self._sampling_rows(step, batch)
        num_rows = (
            [] if step.decodes else [_count_rows(s, n) for s, n in zip(step.sequences, step.query_lens, strict=True)]
        )
        self._inconsistent = False
        self._cut_short = True
        if step.copies:
            self._backend.copy_blocks(step.copies)
            self.scheduler.confirm_copies()
        logits = self._backend.forward(batch)
        pending = self._backend.sample(logits, params) if len(batch.rows) else None
        num_tokens = len(batch.tokens) if len(batch.tokens) == len(batch.rows) else 0
        return _Flight(step, num_rows, pending, num_tokens)

    def _promise(self, flight: _Flight) -> None:
        """Take a launched step into the books as far as it is known: its tokens are computed, and where one is sampled,
        a place is kept for it."""
        self._inconsistent = True
        advance = self.scheduler.advance
        step, row = flight.step, 0
        if step.decodes:
            for row, sequence in enumerate(step.sequences):
                if sequence.finish_reason is None:
                    advance(sequence, len(sequence.tokens))
                    sequence.tokens.append(~row)
        else:
            for sequence, count, (scored, sampled) in zip(
                step.sequences, step.query_lens, flight.num_rows, strict=True
            ):
                row += scored
                if sequence.finish_reason is None:
                    # Drafts are not counted before it is known which of them stay.
                    advance(sequence, min(sequence.num_computed + count, len(sequence.tokens)))
                    if sampled > 0:
                        sequence.tokens.append(~row)
                row += max(sampled, 0)

    def _check(self, prompt_ids: Seq[int], params: SamplingParams) -> int:
        """The length at which the request's sequences must end."""
        vocab, num_prompt, most = self.config.vocab_size, len(prompt_ids), self._max_len
        if num_prompt == 0:
            raise RequestError("the prompt is empty, expected at least one token")
        for name, ids in (
            ("prompt", prompt_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            if ids and (min(ids) < 0 or max(ids) >= vocab):
                wrong = next(i for i in ids if not 0 <= i < vocab)
                raise RequestError(f"{name} holds token {wrong}, expected 0 to {vocab - 1}")
        if params.stop_strings and self._new_decoder is None:
            raise RequestError("stop strings need a tokenizer, and this model has none: use stop_token_ids")
        if params.max_tokens == 0 and params.prompt_logprobs is None:
            raise RequestError("max_tokens is 0, expected at least 1 (or prompt_logprobs, to score the prompt only)")
        room = most - num_prompt
        if room < (params.max_tokens != 0):
            raise RequestError(f"the prompt has {num_prompt} tokens, but {self._room()}")
        return num_prompt + min(room, room if params.max_tokens is None else params.max_tokens)

    def _room(self) -> str:
        config = self.config
        capacity = config.num_blocks * config.block_size
        if capacity < config.max_len:
            held = f"the KV cache holds {capacity} tokens ({config.num_blocks} blocks of {config.block_size})"
            return f"{held}: shorten it, or give the cache more memory"
        more = ", or raise max_len as far as the model knows longer texts"
        return f"a sequence may have {config.max_len} (max_len): shorten it{more}"

    def _sampling_rows(self, step: Step, batch: Batch) -> SamplingBatch:
        if step.decodes:
            return self._sampling.build(step.sequences, batch.positions)
        if not any(s.special or s.score_from < s.num_prompt - 1 for s in step.sequences):
            return greedy_batch(len(batch.rows))
        rows: list[tuple[Sequence, int, int]] = []
        for sequence, count in zip(step.sequences, step.query_lens, strict=True):
            last = len(sequence.tokens) - 1
            for position in wanted_positions(sequence, count):
                if position < last:
                    rows.append((sequence, 0, sequence.tokens[position + 1]))
                else:
                    rows.append((sequence, position - last, -1))
        return sampling_batch(rows) if rows else greedy_batch(0)

    def _settle(self, flight: _Flight) -> list[Delta]:
        """Wait for the step's result and take it into the books."""
        asked = time.perf_counter()
        sampled = None if flight.pending is None else flight.pending.result()
        tokens = [] if sampled is None else sampled.tokens.tolist()
        if tokens and min(tokens) < 0:
            _refuse_nan(flight, tokens)
        now = time.perf_counter()
        self._inconsistent = True
        self._cut_short = False
        if self.speculator is not None and flight.num_tokens:
            # All since the step before: what drafts and verification take of the host is part of what they cost.
            taken = now - self._last_settled
            waited = self._backend.overlaps and not flight.is_ahead
            self.speculator.record(flight.num_tokens, taken, waited, now - asked)
        self._last_settled = now
        if flight.step.decodes:
            accept = self._accept_one
            return [
                accept(sequence, tokens[row], sampled, row, now)
                for row, sequence in enumerate(flight.step.sequences)
                if sequence.finish_reason is None
            ]
        deltas: list[Delta] = []
        row = 0
        for sequence, num_scored, num_sampled in _parts(flight):
            end = row + num_scored
            if sequence.finish_reason is None:
                if num_scored:
                    assert sampled is not None
                    self._score(sequence, sampled, row, end)
                if num_sampled > 0:
                    del sequence.tokens[-1]
                    deltas.append(self._accept(sequence, tokens[end : end + num_sampled], sampled, end, now))
                elif num_sampled == _ENDS:
                    delta = Delta(sequence.request.id, sequence.index, "", [])
                    deltas.append(self._finish(sequence, delta, "length", now))
            row = end + max(num_sampled, 0)
        return deltas

    def _score(self, sequence: Sequence, sampled: Sampled, start: int, end: int) -> None:
        """Take the log-probabilities of prompt tokens in rows start .. end - 1."""
        scores = sequence.request.prompt_logprobs
        assert scores is not None
        assert sampled.target_logprobs is not None
        for row in range(start, end):
            value = float(sampled.target_logprobs[row])
            top = _top(sampled, row, sequence.request.params.prompt_logprobs or 0)
            scores.append(TokenLogprob(sequence.tokens[len(scores)], value, top))

    def _accept_one(self, sequence: Sequence, token: int, sampled: Sampled | None, row: int, now: float) -> Delta:
        """_accept of a token that was promised, made short for what most of them are: one more of a plain sequence."""
        tokens, text, first = sequence.tokens, sequence.text, sequence.num_output == 1
        if first or not sequence.plain or token in sequence.stop_tokens or len(tokens) >= sequence.limit:
            del tokens[-1]
            return self._accept(sequence, [token], sampled, row, now)
        tokens[-1] = token
        piece = "" if text is None else text.push(token)
        delta = Delta(sequence.request.id, sequence.index, piece, [token])
        if text is None or text.stopped_by is None:
            return delta
        sequence.stop_reason = text.stopped_by
        return self._finish(sequence, delta, "stop", now)

    def _accept(self, sequence: Sequence, drawn: list[int], sampled: Sampled | None, row: int, now: float) -> Delta:
        """Verify the drafts: the token drawn at each position is the one that counts; the next is of use only where the
        draft that it was conditioned on is what was drawn."""
        request, drafts = sequence.request, sequence.drafts
        if math.isnan(request.metrics.first_token_time):
            request.metrics.first_token_time = now
        delta = Delta(request.id, sequence.index, "", [])
        reason: FinishReason | None = None
        for i, token in enumerate(drawn):
            reason = self._append(sequence, token, delta)
            if sequence.logprobs is not None:
                assert sampled is not None
                assert sampled.logprobs is not None
                top = _top(sampled, row + i, request.params.logprobs or 0)
                entry = TokenLogprob(token, float(sampled.logprobs[row + i]), top)
                sequence.logprobs.append(entry)
                delta.logprobs = [*(delta.logprobs or ()), entry]
            if reason is not None or i == len(drafts) or token != drafts[i]:
                break
        if drafts:
            num_accepted = len(delta.token_ids) - 1
            request.metrics.num_drafted += len(drafts)
            request.metrics.num_accepted += num_accepted
            assert self.speculator is not None
            self.speculator.drafter.verified(sequence, len(drafts), num_accepted)
            sequence.drafts = []
            self.scheduler.advance(sequence, len(sequence.tokens) - 1)
        return delta if reason is None else self._finish(sequence, delta, reason, now)

    def _append(self, sequence: Sequence, token: int, delta: Delta) -> FinishReason | None:
        """Take one sampled token; the reason if it is the last."""
        params = sequence.request.params
        sequence.tokens.append(token)
        delta.token_ids.append(token)
        if sequence.seen is not None:
            sequence.seen.add(token)
        may_stop = sequence.num_output >= params.min_tokens
        stops = token in sequence.stop_tokens
        if sequence.text is not None and (not stops or params.include_stop_str):
            delta.text += sequence.text.push(token, may_stop)
        if stops:
            sequence.stop_reason = token if token in params.stop_token_ids else None
            return "stop"
        if sequence.text is not None and sequence.text.stopped_by is not None:
            sequence.stop_reason = sequence.text.stopped_by
            return "stop"
        return "length" if len(sequence.tokens) >= sequence.limit else None

    def _finish(self, sequence: Sequence, delta: Delta, reason: FinishReason, now: float) -> Delta:
        request = sequence.request
        if sequence.text is not None and sequence.text.stopped_by is None:
            delta.text += sequence.text.finish()
        self._end(sequence, reason)
        delta.finish_reason = reason
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            request.metrics.finish_time = now
            del self._requests[request.id]
            delta.output = request.output()
        return delta

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Give up the sequence's blocks; count what it made."""
        self.scheduler.remove(sequence)
        if sequence.tokens[-1] < 0:
            del sequence.tokens[-1]  # on its way when the request was cancelled
        sequence.finish_reason = reason
        metrics = sequence.request.metrics
        metrics.num_output_tokens += sequence.num_output
        metrics.longest_output = max(metrics.longest_output, sequence.num_output)


def _count_rows(sequence: Sequence, count: int) -> tuple[int, int]:
    """Rows that score the prompt and rows that sample (or _ENDS) where the sequence runs `count` tokens."""
    end, num_tokens = sequence.num_computed + count, len(sequence.tokens)
    num_scored = max(0, min(end, sequence.num_prompt - 1) - max(sequence.num_computed, sequence.score_from))
    if end < num_tokens:
        return num_scored, 0
    return num_scored, _ENDS if num_tokens == sequence.limit else end - num_tokens + 1


def _parts(flight: _Flight) -> Iterable[tuple[Sequence, int, int]]:
    """Each sequence of the step with its rows that score and its rows that sample."""
    if flight.step.decodes:
        return ((sequence, 0, 1) for sequence in flight.step.sequences)
    return ((sequence, *rows) for sequence, rows in zip(flight.step.sequences, flight.num_rows, strict=True))


def _refuse_nan(flight: _Flight, tokens: list[int]) -> None:
    """Raise ModelError where a row of a request that still runs has no token."""
    row = 0
    for sequence, num_scored, num_sampled in _parts(flight):
        end = row + num_scored + max(num_sampled, 0)
        if sequence.finish_reason is None and any(token < 0 for token in tokens[row:end]):
            raise ModelError("the model gave logits that are not numbers (NaN): its weights or formats are damaged")
        row = end


def _top(sampled: Sampled, row: int, most: int) -> tuple[tuple[int, float], ...]:
    if most == 0:
        return ()
    assert sampled.top_ids is not None
    assert sampled.top_logprobs is not None
    ids, values = sampled.top_ids[row, :most].tolist(), sampled.top_logprobs[row, :most].tolist()
    return tuple((i, v) for i, v in zip(ids, values, strict=True) if i >= 0)
