"""Drives llama.cpp through its C interface, as bound by llama-cpp-python. Model: a GGUF file."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from measure import BATCH_SIZE, PREFILL_LEN, Prompts, System, main

CONTEXT_LEN = 2048


@llama_cpp.llama_log_callback
def ignore_log(_level: int, _text: bytes, _data: object) -> None:
    """At module level because llama.cpp calls it as long as the process lives."""


def load(model: str, threads: int) -> System:
    llama_cpp.llama_log_set(ignore_log, None)
    llama_cpp.llama_backend_init()
    weights = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT_LEN, PREFILL_LEN, PREFILL_LEN
    params.n_threads = params.n_threads_batch = threads
    params.n_seq_max, params.kv_unified = BATCH_SIZE, True
    context = llama_cpp.llama_init_from_model(weights, params)
    if not context:
        raise RuntimeError(f"llama.cpp did not load {model}")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(weights))
    batch = llama_cpp.llama_batch_init(PREFILL_LEN, 0, 1)

    def fill(row: int, token: int, position: int, sequence: int, wants_logits: bool) -> None:
        batch.token[row], batch.pos[row] = token, position
        batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, sequence, wants_logits

    def step(num_tokens: int, rows: list[int]) -> list[int]:
        batch.n_tokens = num_tokens
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        pointers = (llama_cpp.llama_get_logits_ith(context, row) for row in rows)
        return [int(np.ctypeslib.as_array(pointer, shape=(vocab_size,)).argmax()) for pointer in pointers]

    def generate(prompts: Prompts, num_tokens: int) -> int:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        length = len(prompts[0])
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                fill(sequence * length + position, token, position, sequence, position == length - 1)
        last_rows = [(sequence + 1) * length - 1 for sequence in range(len(prompts))]
        tokens = step(len(prompts) * length, last_rows)
        made = len(tokens)
        for position in range(length, length + num_tokens - 1):
            for sequence, token in enumerate(tokens):
                fill(sequence, token, position, sequence, True)
            tokens = step(len(prompts), list(range(len(prompts))))
            made += len(tokens)
        return made

    info = ctypes.string_at(llama_cpp.llama_print_system_info()).decode()
    return System(generate, {"llama-cpp-python": llama_cpp.__version__, "ggml": info}, Path(model).stat().st_size)


if __name__ == "__main__":
    main(load)
