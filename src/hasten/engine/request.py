"""What a user asks (SamplingParams), what is kept while it runs (Request, Sequence), and what comes back.

Knows nothing of scheduling, devices or tokenizers. A Request is one prompt; a Sequence is one of its n continuations.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from hasten.errors import RequestError

if TYPE_CHECKING:
    from hasten.engine.draft_model import Mirror
    from hasten.engine.sampling import Seen
    from hasten.engine.speculate import NgramIndex
    from hasten.engine.text import TextStream

FinishReason = Literal["stop", "length", "cancelled"]

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is continued.

    None means "not given": the model's generation_config.json decides, and failing that greedy decoding with no cut.
    What has a default other than None does not take it. Numbers may be numpy's; they are kept as Python's.

    n: continuations of the prompt. max_tokens: at most so many new tokens; not given, as many as fit. min_tokens: no
    end-of-sequence or stop token is sampled, and no stop string is looked for, before so many.
    temperature: 0 is greedy. top_k: 0 is off. top_p, min_p: 1 and 0 are off. Order: penalties and logit_bias,
    temperature, top_k, top_p, min_p. repetition_penalty acts on tokens of prompt and output (Keskar et al. 2019),
    presence_penalty and frequency_penalty on tokens of the output (OpenAI's definition). logit_bias: token id -> what
    is added to its logit. seed: the same request with the same seed gives the same tokens, whatever else runs; not
    given, a fresh one is drawn. stop: strings that end the text; they are not part of it unless include_stop_str.
    stop_token_ids: likewise. ignore_eos: go on after an end-of-sequence token. skip_special_tokens: leave special
    tokens out of the text. logprobs: besides each new token's log-probability, that many best alternatives'.
    prompt_logprobs: the same for the prompt's tokens (echo). priority: lower runs first, then order of arrival.
    Raises RequestError, naming the parameter, the value and the range.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Seq[str] = ()
    include_stop_str: bool = False
    stop_token_ids: Seq[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in _WHOLE.items():
            if not self._is_left_out(name):
                object.__setattr__(self, name, whole(name, getattr(self, name), low, high))
        for name, (span, accepts) in _REAL.items():
            if not self._is_left_out(name):
                object.__setattr__(self, name, _real(name, getattr(self, name), span, accepts))
        self._check_collections()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, expected at most max_tokens ({self.max_tokens})")

    def _is_left_out(self, name: str) -> bool:
        """None, where that means "not given"."""
        return getattr(self, name) is None and name in _OPTIONAL

    def _check_collections(self) -> None:
        for name in ("include_stop_str", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r:.80}, expected True or False")
        if not isinstance(self.stop, (str, list, tuple)):
            raise RequestError(f"stop is {self.stop!r:.80}, expected a string or a list of strings")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop holds {text!r:.80}, expected non-empty strings")
        if not isinstance(self.stop_token_ids, Iterable) or isinstance(self.stop_token_ids, str | bytes | Mapping):
            raise RequestError(f"stop_token_ids is {self.stop_token_ids!r:.80}, expected a list of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(whole("stop_token_ids", t, 0) for t in self.stop_token_ids))
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias is {self.logit_bias!r:.80}, expected a mapping of token id to bias")
        span, accepts = "finite numbers from -1000 to 1000", lambda v: -1000 <= v <= 1000
        biases = {whole("logit_bias", t, 0): _real("logit_bias", b, span, accepts) for t, b in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", biases)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) and self.stop else tuple(self.stop)

    def with_defaults(self, defaults: Mapping[str, object]) -> SamplingParams:
        """Fill what was not given from `defaults` (names of these fields); then from the neutral values."""
        neutral = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        given = {**neutral, **defaults}
        missing = {name: value for name, value in given.items() if getattr(self, name) is None}
        return replace(self, **missing)  # type: ignore[arg-type]


_OPTIONAL = frozenset(item.name for item in fields(SamplingParams) if item.default is None)
_WHOLE: dict[str, tuple[int, int | None]] = {
    "n": (1, 1024), "max_tokens": (0, None), "min_tokens": (0, None), "top_k": (0, None), "seed": (0, _MASK64),
    "logprobs": (0, 1000), "prompt_logprobs": (0, 1000), "priority": (-(1 << 31), (1 << 31) - 1),
}  # fmt: skip
_REAL: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("0 <= temperature <= 100", lambda v: 0 <= v <= 100),
    "top_p": ("0 < top_p <= 1", lambda v: 0 < v <= 1),
    "min_p": ("0 <= min_p <= 1", lambda v: 0 <= v <= 1),
    "repetition_penalty": ("repetition_penalty > 0", lambda v: v > 0),
    "presence_penalty": ("-2 <= presence_penalty <= 2", lambda v: -2 <= v <= 2),
    "frequency_penalty": ("-2 <= frequency_penalty <= 2", lambda v: -2 <= v <= 2),
}


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as Python's int, whatever whole number it is."""

    def refuse() -> NoReturn:
        span = f">= {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name} is {value!r:.80}, expected a whole number {span}")

    if isinstance(value, bool):
        refuse()
    try:
        number = operator.index(value)
    except TypeError:
        refuse()
    if number < low or (high is not None and number > high):
        refuse()
    return number


def _real(name: str, value: Any, span: str, accepts: Callable[[float], bool]) -> float:
    """The value as Python's float, whatever number it is; text that spells one is none."""

    def refuse() -> NoReturn:
        raise RequestError(f"{name} is {value!r:.80}, expected {span}")

    if isinstance(value, bool | str | bytes):
        refuse()
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        refuse()
    if not math.isfinite(number) or not accepts(number):
        refuse()
    return number


@dataclass(slots=True)
class Metrics:
    """Times of one request in seconds (of time.perf_counter), and counts over its n continuations.

    ttft: time to first token, queueing included. tpot: mean time per output token after the first, over the sequence
    that took longest. num_cached_tokens: prompt tokens found in the KV cache. num_accepted of num_drafted draft tokens
    were right. Undefined times are NaN.
    """

    arrival_time: float
    first_token_time: float = math.nan
    finish_time: float = math.nan
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    longest_output: int = 0
    num_cached_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_preemptions: int = 0

    @property
    def ttft(self) -> float:
        return self.first_token_time - self.arrival_time

    @property
    def tpot(self) -> float:
        if self.longest_output < 2:
            return math.nan
        return (self.finish_time - self.first_token_time) / (self.longest_output - 1)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model's own distribution, and the best alternatives in falling order."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One continuation. token_ids holds every sampled token, the one that ended it included. finish_reason: "stop" (an
    end-of-sequence token, a stop token or a stop string; the latter two are in stop_reason), "length" or
    "cancelled"."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprob, ...] | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request. prompt_logprobs[i] is of prompt token i; the first is None, as nothing predicts it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    metrics: Metrics

    @property
    def text(self) -> str:
        """The first continuation's text."""
        return self.outputs[0].text


@dataclass(slots=True)
class Delta:
    """What one step added to one continuation. finish_reason is set on its last; `output` on the request's last."""

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    output: RequestOutput | None = None


class Acceptance:
    """How often drafts are right: decayed counts, `assumed` of those that stand for what is not known yet."""

    __slots__ = ("accepted", "assumed", "rejected")

    def __init__(self) -> None:
        self.accepted, self.rejected, self.assumed = 0.0, 0.0, 2.0

    def record(self, num_drafted: int, num_accepted: int) -> None:
        """Outcome of one verification."""
        self.accepted = 0.9 * self.accepted + num_accepted
        self.rejected = 0.9 * self.rejected + (num_accepted < num_drafted)
        self.assumed *= 0.9

    def rate(self, usual: float) -> float:
        """Estimated chance that a drafted token is right, given that those before it are. usual: of others."""
        return (self.accepted + usual * self.assumed) / (self.accepted + self.rejected + self.assumed)


class Request:
    """One prompt and its n sequences while they run."""

    __slots__ = ("id", "metrics", "num_unfinished", "params", "prompt", "prompt_ids", "prompt_logprobs", "sequences")

    def __init__(self, request_id: str, prompt_ids: list[int], params: SamplingParams, prompt: str | None) -> None:
        self.id = request_id
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self.params = params
        self.sequences: list[Sequence] = []
        self.num_unfinished = params.n
        self.metrics = Metrics(arrival_time=time.perf_counter(), num_prompt_tokens=len(prompt_ids))
        # Filled by the first sequence as its prompt runs.
        self.prompt_logprobs: list[TokenLogprob | None] | None = None if params.prompt_logprobs is None else [None]

    def output(self) -> RequestOutput:
        logprobs = self.prompt_logprobs
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=tuple(self.prompt_ids),
            outputs=tuple(sequence.output() for sequence in self.sequences),
            prompt_logprobs=None if logprobs is None else tuple(logprobs),
            metrics=self.metrics,
        )


class Sequence:
    """One continuation while it runs. Index ranges of `tokens`:

    [0, num_prompt)             the prompt
    [num_prompt, len)           sampled; a negative last one is on its way: row ~token of the step that runs now
    [0, num_computed)           keys and values are in `blocks`, or will be when that step is done
    [num_computed, len)         to be run; in decoding exactly the last sampled token
    drafts                      proposed to follow; run with the step and kept only where sampling agrees
    """

    __slots__ = (
        "acceptance", "blocks", "drafts", "finish_reason", "hashes", "index", "key", "limit", "logprobs", "mirror",
        "ngrams", "num_computed", "num_prompt", "num_published", "plain", "request", "seed", "seen", "special",
        "stop_reason", "stop_tokens", "text", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, index: int, arrival: int, seed: int, limit: int) -> None:
        self.request = request
        self.index = index
        self.key = (request.params.priority, arrival, index)  # order of service: lower first
        self.seed = derive_seed(seed, index)
        self.limit = limit  # len(tokens) at which it must end
        self.tokens = list(request.prompt_ids)
        self.num_prompt = len(self.tokens)
        self.num_computed = 0
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []  # of the leading full blocks of `tokens`, as far as needed yet
        self.num_published = 0  # of `blocks`, those offered for reuse
        self.drafts: list[int] = []
        self.special = True  # its rows need more than an argmax
        self.plain = False  # its tokens come without log-probabilities, penalties or a ban on ending
        self.stop_tokens: frozenset[int] = frozenset()  # end-of-sequence tokens included, unless ignored
        self.seen: Seen | None = None
        self.acceptance = Acceptance()
        self.ngrams: NgramIndex | None = None
        self.mirror: Mirror | None = None
        self.text: TextStream | None = None
        self.logprobs: list[TokenLogprob] | None = None if request.params.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def score_from(self) -> int:
        """First position whose logits are still wanted to score the prompt; len(tokens) where none is."""
        wanted = self.request.prompt_logprobs
        if wanted is None or self.index or len(wanted) == self.num_prompt:
            return len(self.tokens)
        return len(wanted) - 1

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text="" if self.text is None else self.text.emitted,
            token_ids=tuple(self.tokens[self.num_prompt :]),
            finish_reason=self.finish_reason or "cancelled",
            stop_reason=self.stop_reason,
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
        )


def derive_seed(seed: int, index: int) -> int:
    """Seed of continuation `index`; the first keeps the request's own, so n = 1 and n = 3 share it. SplitMix64's
    finaliser (Steele et al. 2014) scatters the others."""
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
