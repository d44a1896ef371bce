"""Drives llama.cpp through its C interface, as bound by llama-cpp-python. Model: a GGUF file.

Each task gets a context of its own, as large as it needs and with a KV cache a sequence, llama.cpp's default: one
shared cache would cost it 6-11 % with eight streams and in prefill, and a larger one memory that it never uses.
"""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from measure import PREFILL_LEN, Prompts, System, main

CONTEXT_STEP = 256  # llama.cpp rounds a sequence's cache up to this itself


@llama_cpp.llama_log_callback
def ignore_log(_level: int, _text: bytes, _data: object) -> None:
    """At module level because llama.cpp calls it as long as the process lives."""


class Context:
    """One llama_context and the batch that fills it, for so many sequences of at most so many tokens."""

    def __init__(self, weights: llama_cpp.llama_model_p, sequences: int, length: int, threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * length, sequences
        params.n_threads = params.n_threads_batch = threads
        self.handle = llama_cpp.llama_init_from_model(weights, params)
        if not self.handle:
            raise RuntimeError("llama.cpp made no context")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(weights))
        self.batch = llama_cpp.llama_batch_init(PREFILL_LEN, 0, 1)

    def free(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.handle)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.handle), True)

    def fill(self, row: int, token: int, position: int, sequence: int, wants_logits: bool) -> None:
        batch = self.batch
        batch.token[row], batch.pos[row] = token, position
        batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, sequence, wants_logits

    def step(self, num_tokens: int, rows: list[int]) -> list[int]:
        self.batch.n_tokens = num_tokens
        if llama_cpp.llama_decode(self.handle, self.batch) != 0:
            raise RuntimeError("llama_decode failed")
        pointers = (llama_cpp.llama_get_logits_ith(self.handle, row) for row in rows)
        return [int(np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).argmax()) for pointer in pointers]


def decode(context: Context, prompts: Prompts, num_tokens: int) -> int:
    context.clear()
    length = len(prompts[0])
    for sequence, prompt in enumerate(prompts):
        for position, token in enumerate(prompt):
            context.fill(sequence * length + position, token, position, sequence, position == length - 1)
    last_rows = [(sequence + 1) * length - 1 for sequence in range(len(prompts))]
    tokens = context.step(len(prompts) * length, last_rows)
    made = len(tokens)
    for position in range(length, length + num_tokens - 1):
        for sequence, token in enumerate(tokens):
            context.fill(sequence, token, position, sequence, True)
        tokens = context.step(len(prompts), list(range(len(prompts))))
        made += len(tokens)
    return made


def load(model: str, threads: int) -> System:
    llama_cpp.llama_log_set(ignore_log, None)
    llama_cpp.llama_backend_init()
    weights = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    if not weights:
        raise RuntimeError(f"llama.cpp did not load {model}")
    held: dict[tuple[int, int], Context] = {}

    def generate(prompts: Prompts, num_tokens: int) -> int:
        length = -(-(len(prompts[0]) + num_tokens) // CONTEXT_STEP) * CONTEXT_STEP
        shape = (len(prompts), length)
        if shape not in held:
            for old in held.values():
                old.free()
            held.clear()
            held[shape] = Context(weights, *shape, threads)
        return decode(held[shape], prompts, num_tokens)

    info = ctypes.string_at(llama_cpp.llama_print_system_info()).decode()
    return System(generate, {"llama-cpp-python": llama_cpp.__version__, "ggml": info}, Path(model).stat().st_size)


if __name__ == "__main__":
    main(load)
