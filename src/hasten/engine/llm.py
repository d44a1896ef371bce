"""LLM: a model folder, ready to answer. The seam where model, backend and engine meet.

Knows how they are put together and how prompts become token ids; policy is in engine.py, files are in hasten.model.
"""

import operator
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hasten.backends.base import Backend, StepLimits
from hasten.engine.capacity import plan_cache
from hasten.engine.config import EngineConfig
from hasten.engine.draft_model import ModelDrafter
from hasten.engine.engine import Engine
from hasten.engine.request import Delta, RequestOutput, SamplingParams, whole
from hasten.engine.speculate import Speculator
from hasten.errors import ModelError, RequestError
from hasten.model.checkpoint import open_checkpoint
from hasten.model.hub import resolve
from hasten.model.settings import default_kv_cache, stated_run
from hasten.model.spec import ModelSpec
from hasten.model.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Device = Literal["auto", "cpu", "cuda", "reference"]
KvCache = Literal["auto", "fp32", "bf16", "int8", "fp8"]
Speculation = Literal["none", "ngram"]


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probabilities of a given text. logprobs float32 [len(token_ids) - 1]: entry i is of token i + 1, given those
    before it; nothing predicts the first."""

    token_ids: tuple[int, ...]
    logprobs: NDArray[np.float32]


class LLM:
    """Load `model` and answer prompts.

    model: a Hugging Face folder, a name on the hub, or "demo". device: "auto" (a GPU where there is one that can be
    used, else the CPU), "cpu", "cuda", "reference" (numpy, slow), or a Backend of one's own. format: "fp8" rounds the
    weights as they are loaded, on a GPU. deterministic: on a GPU too, what a request gets does not depend on its
    company, bit for bit. threads: of a CPU, 0 is all cores.
    kv_cache: how keys and values are stored, as far as the device knows it; "auto" is fp32 for an fp32 checkpoint and
    bf16 else. speculation: "ngram" drafts from the text so far. drafter: a model with the same vocabulary, say a
    compressed copy, that drafts instead. Either changes the speed and never the tokens. What is left None or automatic
    is taken from the folder where `hasten tune` has written it.
    max_len: longest prompt and answer, in tokens; None is what the model knows, as far as it fits. A model with two
    sets of rotary factors (Phi-3 longrope) takes those for long texts where max_len asks for more than its original
    length, and is held to that length with None. memory: a share of the device's memory for this process (0.9), or
    bytes for the KV cache; None is enough for a few sequences on a CPU, 0.9 on a GPU. max_sequences: that run at once.
    max_step_tokens: tokens of one step; longer prompts run in chunks. None is what suits the device.
    Raises ModelError for a model that cannot be used, ResourceError where memory does not suffice or there is no such
    device.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: Device | Backend = "auto",
        format: str | None = None,
        deterministic: bool = False,
        threads: int | None = None,
        kv_cache: KvCache | None = None,
        speculation: Speculation | None = None,
        drafter: str | Path | None = None,
        max_len: int | None = None,
        memory: int | float | None = None,
        max_sequences: int | None = None,
        max_step_tokens: int | None = None,
        block_size: int = 32,
    ) -> None:
        _check_sizes(
            max_len=max_len, max_sequences=max_sequences, max_step_tokens=max_step_tokens, block_size=block_size
        )
        if threads is not None:
            whole("threads", threads, 0)
        if isinstance(memory, bool) or not isinstance(memory, int | float | None):
            raise RequestError(f"memory is {memory!r}, expected a share such as 0.9, or a whole number of bytes")
        checkpoint = open_checkpoint(resolve(str(model)))
        stated = stated_run(checkpoint)
        way = _speculation(speculation, drafter) or stated.speculation or "none"
        self.path = checkpoint.path
        self.spec = _with_one_rope(checkpoint.spec, max_len)
        self.tokenizer = Tokenizer(checkpoint.path)
        self.backend = _make_backend(device, threads or stated.threads or 0, format, deterministic)
        self.kv_cache = _kv_dtype(kv_cache, stated.kv_cache, self.spec, self.backend)
        self.backend.load(self.spec, checkpoint.weights())
        drafting = None if drafter is None else _load_drafter(drafter, self.backend, self.spec, max_len)
        limits = _limits(self.backend.usual, max_sequences, max_step_tokens)
        num_blocks = self._allocate(drafting, limits, block_size, max_len, memory)
        self.engine = self._make_engine(limits, num_blocks, block_size, drafting, way)
        self._inboxes: dict[str, deque[Delta]] = {}

    def _allocate(
        self, drafting: Backend | None, limits: StepLimits, block_size: int, max_len: int | None, memory: float | None
    ) -> int:
        """Make the KV caches, the drafter's with as many blocks; sets max_len. The number of blocks."""
        backends = [self.backend] if drafting is None else [self.backend, drafting]
        found = [backend.memory(limits) for backend in backends]  # of one device: only what steps take adds up
        num_blocks, self.max_len = plan_cache(
            sum(backend.block_bytes(block_size, self.kv_cache) for backend in backends),
            block_size,
            self.spec.max_position,
            max_len,
            memory,
            replace(found[0], reserved=sum(memory.reserved for memory in found)),
            limits.max_sequences,
        )
        for backend in backends:
            backend.allocate(num_blocks, block_size, self.kv_cache)
        return num_blocks

    def _make_engine(
        self, limits: StepLimits, num_blocks: int, block_size: int, drafting: Backend | None, speculation: str
    ) -> Engine:
        config = EngineConfig(
            vocab_size=self.spec.vocab_size,
            num_blocks=num_blocks,
            block_size=block_size,
            max_len=self.max_len,
            eos_token_ids=self.tokenizer.eos_token_ids,
            max_sequences=limits.max_sequences,
            max_step_tokens=limits.max_tokens,
            max_extra_rows=limits.max_rows - limits.max_sequences,
        )
        drafter = None if drafting is None else ModelDrafter(drafting, config)
        return Engine(
            self.backend,
            config,
            new_decoder=self.tokenizer.detokenizer,
            defaults=self.tokenizer.defaults,
            speculator=Speculator(drafter) if drafter is not None or speculation == "ngram" else None,
        )

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop every request. Weights and cache go with the last reference to the backend."""
        self.engine.abort()
        self._inboxes.clear()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt (text, or token ids); outputs in the order of the prompts. `params` is one for all, or
        one a prompt. An interrupt or error ends these requests and leaves the rest as it was."""
        batch = _as_batch(prompts)
        each = _per_prompt(params, len(batch))
        return self._finish([self._encode(prompt) for prompt in batch], each, [_text_of(prompt) for prompt in batch])

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, a list of {"role", "content"}, or a list of them, by the model's chat template."""
        batch = _as_conversations(messages)
        each = _per_prompt(params, len(batch))
        prompts = [self.tokenizer.encode_chat(conversation) for conversation in batch]
        return self._finish(prompts, each, [None] * len(batch))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """The pieces of one prompt's continuations as they are made. The last carries the whole `output`. What cannot
        be served is refused here, not at the first piece. Leaving the loop early cancels the request."""
        return self._run([self.engine.add(self._encode(prompt), params, _text_of(prompt))])

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[Delta]:
        """The same for one conversation."""
        (conversation,) = _as_conversations([messages] if _is_list(messages) else messages)
        return self._run([self.engine.add(self.tokenizer.encode_chat(conversation), params)])

    def score(self, texts: Prompt | Sequence[Prompt]) -> list[Score]:
        """Log-probability of every token of each text but its first."""
        batch = [self._encode(text) for text in _as_batch(texts)]
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        scores = []
        for output in self._finish(batch, [params] * len(batch), [None] * len(batch)):
            found = [entry.logprob for entry in output.prompt_logprobs or () if entry is not None]
            scores.append(Score(output.prompt_token_ids, np.array(found, np.float32)))
        return scores

    def _finish(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams | None], texts: Sequence[str | None]
    ) -> list[RequestOutput]:
        ids: list[str] = []
        try:
            for prompt, each, text in zip(prompts, params, texts, strict=True):
                ids.append(self.engine.add(prompt, each, text))
        except BaseException:
            for request_id in ids:
                self.engine.cancel(request_id)
            raise
        done = {delta.request_id: delta.output for delta in self._run(ids) if delta.output is not None}
        return [done[request_id] for request_id in ids]

    def _run(self, ids: Sequence[str]) -> Iterator[Delta]:
        """Drive the engine until the requests are done, yielding their deltas; those of others go to their own
        callers. It is begun at once: what others' steps make of these requests is kept for it, and they are cancelled
        where it is dropped before its first delta is asked for."""
        deltas = self._deltas(ids)
        next(deltas)
        return deltas

    def _deltas(self, ids: Sequence[str]) -> Iterator[Delta]:
        running = set(ids)
        inbox: deque[Delta] = deque()
        self._inboxes.update(dict.fromkeys(ids, inbox))
        try:
            yield Delta("", 0, "", [])  # taken by _run
            while running:
                while not inbox:
                    self._step()
                    if not inbox and self.engine.num_unfinished == 0:
                        raise RequestError("an interrupted step ended every request of this model: ask again")
                delta = inbox.popleft()
                if delta.output is not None:
                    running.discard(delta.request_id)
                yield delta
        finally:
            for request_id in ids:
                self._inboxes.pop(request_id, None)
            for request_id in running:
                self.engine.cancel(request_id)

    def _step(self) -> None:
        for delta in self.engine.step():
            if delta.request_id in self._inboxes:
                self._inboxes[delta.request_id].append(delta)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        try:
            if _is_list(prompt):
                return [operator.index(token) for token in prompt]
        except TypeError:
            pass
        raise RequestError(f"a prompt is {prompt!r:.80}, expected text or a list of token ids")


def _is_list(value: object) -> bool:
    """Whether it holds items in an order, to be counted and read again: neither text nor an iterator."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt, or several: a list of numbers is one."""
    if isinstance(prompts, str):
        return [prompts]
    if not _is_list(prompts):
        raise RequestError(f"prompts is {prompts!r:.80}, expected text, a list of token ids, or a list of such prompts")
    if len(prompts) and isinstance(prompts[0], int | np.integer):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _as_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> Sequence[Sequence[Message]]:
    """One conversation, or several: a list of messages is one."""
    if _is_list(messages):
        batch = [messages] if len(messages) == 0 or isinstance(messages[0], Mapping) else messages
        if all(map(_is_list, batch)):
            return batch  # type: ignore[return-value]
    raise RequestError(f'messages is {messages!r:.80}, expected a list of {{"role": ..., "content": ...}}')


def _text_of(prompt: Prompt) -> str | None:
    return prompt if isinstance(prompt, str) else None


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not _is_list(params):
        raise RequestError(f"params is {params!r:.80}, expected SamplingParams, or a list of one for each prompt")
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts: give one, or one for each")
    return params


def _make_backend(device: str | Backend, threads: int, format: str | None, deterministic: bool) -> Backend:
    if isinstance(device, str):
        from hasten.backends import open_backend

        return open_backend(device, threads=threads, format=format, deterministic=deterministic)
    if format is not None or deterministic:
        raise RequestError("format and deterministic are for a device that is named: give them to the Backend")
    return device


def _load_drafter(drafter: str | Path, main: Backend, spec: ModelSpec, max_len: int | None) -> Backend:
    """The drafter's model on the same device."""
    checkpoint = open_checkpoint(resolve(str(drafter)))
    own = _with_one_rope(checkpoint.spec, max_len)
    if own.vocab_size != spec.vocab_size:
        raise ModelError(
            f"the drafter {drafter} has a vocabulary of {own.vocab_size} tokens, expected the model's {spec.vocab_size}"
        )
    if own.max_position < spec.max_position:
        raise ModelError(
            f"the drafter {drafter} knows texts of {own.max_position} tokens, expected at least the model's"
            f" {spec.max_position}"
        )
    backend = main.beside()
    backend.load(own, checkpoint.weights())
    return backend


def _limits(usual: StepLimits, max_sequences: int | None, max_step_tokens: int | None) -> StepLimits:
    """The largest step: what is asked for, else what suits the device. Extra rows are for drafts and scored prompts."""
    sequences = max_sequences or usual.max_sequences
    extra_rows = usual.max_rows - usual.max_sequences
    return StepLimits(max(max_step_tokens or usual.max_tokens, sequences), sequences, sequences + extra_rows)


def _check_sizes(**sizes: object) -> None:
    """Raises RequestError for one that is given and not a whole number of at least 1."""
    for name, value in sizes.items():
        if value is not None:
            whole(name, value, 1)


def _speculation(asked: str | None, drafter: object) -> str | None:
    if asked not in (None, "none", "ngram"):
        raise RequestError(f"speculation is {asked!r}, expected none or ngram")
    if drafter is not None and asked is not None:
        raise RequestError(f"speculation is {asked!r} and there is a drafter: give one of them")
    return asked


def _with_one_rope(spec: ModelSpec, max_len: int | None) -> ModelSpec:
    """The spec with its rotary factors settled for all lengths. Were they to change when a sequence grows, what is
    cached would depend on how long the sequence was when it was computed."""
    original = max((rope.original_max for rope in spec.ropes if rope.long_inv_freq is not None), default=0)
    if not original:
        return spec
    is_long = max_len is not None and max_len > original
    ropes = tuple(
        replace(
            rope,
            inv_freq=rope.long_inv_freq if is_long and rope.long_inv_freq is not None else rope.inv_freq,
            long_inv_freq=None,
        )
        for rope in spec.ropes
    )
    return replace(spec, ropes=ropes, max_position=spec.max_position if is_long else original)


def _kv_dtype(asked: object, stated: str | None, spec: ModelSpec, backend: Backend) -> str:
    if asked is None or asked == "auto":
        return default_kv_cache(spec, backend.kv_dtypes, stated)
    if asked not in backend.kv_dtypes:
        raise RequestError(f"kv_cache is {asked!r}, expected auto or, on this device, {' or '.join(backend.kv_dtypes)}")
    return str(asked)
