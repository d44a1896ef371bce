"""LLM: a model folder, ready to answer. The seam where model, backend and engine meet.

Knows how they are put together and how prompts become token ids; policy is in engine.py, files are in hasten.model.
"""

import operator
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hasten.backends.base import Backend
from hasten.engine.capacity import plan_cache
from hasten.engine.engine import Engine, EngineConfig
from hasten.engine.request import Delta, RequestOutput, SamplingParams
from hasten.engine.speculate import Speculator
from hasten.errors import ModelError, RequestError
from hasten.hardware import memory_available
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.hub import resolve
from hasten.model.spec import ModelSpec
from hasten.model.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
KvCache = Literal["auto", "fp32", "bf16", "int8"]
Speculation = Literal["none", "ngram"]


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probabilities of a given text. logprobs float32 [len(token_ids) - 1]: entry i is of token i + 1, given those
    before it; nothing predicts the first."""

    token_ids: tuple[int, ...]
    logprobs: NDArray[np.float32]


class LLM:
    """Load `model` and answer prompts.

    model: a Hugging Face folder, a name on the hub, or "demo". backend: "auto" (the native one for this machine),
    "cpu", "reference" (numpy, slow), or a Backend of one's own. threads: 0 is all cores. kv_cache: how keys and values
    are stored; "auto" is fp32 for an fp32 checkpoint and bf16 else. speculation: "ngram" drafts from the text so far,
    which changes the speed and never the tokens. What is left None or automatic is taken from the folder where
    `hasten tune` has written it.
    max_len: longest prompt and answer, in tokens; None is what the model knows, as far as it fits. A model with two
    sets of rotary factors (Phi-3 longrope) takes those for long texts where max_len asks for more than its original
    length, and is held to that length with None. memory: bytes for the KV cache; None is enough for a few sequences.
    max_sequences: that run at once. max_step_tokens: tokens of one step; longer prompts run in chunks.
    Raises ModelError for a model that cannot be used, ResourceError where memory does not suffice.
    """

    def __init__(
        self,
        model: str,
        *,
        backend: Literal["auto", "cpu", "reference"] | Backend = "auto",
        threads: int | None = None,
        kv_cache: KvCache | None = None,
        speculation: Speculation | None = None,
        max_len: int | None = None,
        memory: int | None = None,
        max_sequences: int = 64,
        max_step_tokens: int = 512,
        block_size: int = 32,
    ) -> None:
        checkpoint = open_checkpoint(resolve(model))
        settings = _run_settings(checkpoint)
        kv_dtype = _kv_dtype(kv_cache if kv_cache not in (None, "auto") else settings.get("kv_cache"), checkpoint)
        speculation = speculation or settings.get("speculation") or "none"
        if speculation not in ("none", "ngram"):
            raise RequestError(f"speculation is {speculation!r}, expected none or ngram")
        self.path = checkpoint.path
        self.spec = _with_one_rope(checkpoint.spec, max_len)
        self.tokenizer = Tokenizer(checkpoint.path)
        self.backend = _make_backend(backend, threads or settings.get("threads") or 0)
        self.backend.load(self.spec, checkpoint.weights())
        num_blocks, self.max_len = plan_cache(
            self.backend.block_bytes(block_size, kv_dtype),
            block_size,
            self.spec.max_position,
            max_len,
            memory,
            memory_available(),
        )
        self.backend.allocate(num_blocks, block_size, kv_dtype)
        self.kv_cache = kv_dtype
        self.engine = Engine(
            self.backend,
            EngineConfig(
                vocab_size=self.spec.vocab_size,
                num_blocks=num_blocks,
                block_size=block_size,
                max_len=self.max_len,
                eos_token_ids=self.tokenizer.eos_token_ids,
                max_sequences=max_sequences,
                max_step_tokens=max_step_tokens,
            ),
            new_decoder=self.tokenizer.detokenizer,
            defaults=self.tokenizer.defaults,
            speculator=Speculator() if speculation == "ngram" else None,
        )
        self._inboxes: dict[str, deque[Delta]] = {}

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


def _make_backend(backend: str | Backend, threads: int) -> Backend:
    if not isinstance(backend, str):
        return backend
    if backend in ("auto", "cpu"):
        from hasten.backends.cpu import CpuBackend

        return CpuBackend(threads=threads)
    if backend == "reference":
        from hasten.backends.reference import ReferenceBackend

        return ReferenceBackend()
    raise RequestError(f"backend is {backend!r}, expected auto, cpu, reference or a Backend")


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


_SETTINGS = ("kv_cache", "speculation", "threads")


def _run_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json's `hasten.run`, as `hasten tune` writes it."""
    section = checkpoint.config.get("hasten", {})
    settings = section.get("run", {}) if isinstance(section, dict) else None
    if not isinstance(settings, dict):
        raise ModelError(f"{checkpoint.path}/config.json: hasten.run is {settings!r}, expected an object")
    unknown = sorted(set(settings) - set(_SETTINGS))
    if unknown:
        raise ModelError(
            f"{checkpoint.path}/config.json: hasten.run has {', '.join(unknown)}, expected only {', '.join(_SETTINGS)}"
        )
    return settings


def _kv_dtype(asked: object, checkpoint: Checkpoint) -> str:
    if asked is None or asked == "auto":
        return "fp32" if checkpoint.spec.dtype == "fp32" else "bf16"
    if asked not in ("fp32", "bf16", "int8"):
        raise RequestError(f"kv_cache is {asked!r}, expected auto, fp32, bf16 or int8")
    return str(asked)
