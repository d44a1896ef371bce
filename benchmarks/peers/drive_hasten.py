"""Drives hasten through its public API with its defaults. Model: a folder, plain or written by `hasten compress`."""

from measure import Prompts, System, main

import hasten
from hasten import LLM, SamplingParams


def load(model: str, threads: int) -> System:
    llm = LLM(model, device="cpu", threads=threads)

    def generate(prompts: Prompts, num_tokens: int) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        outputs = llm.generate(prompts, params)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    # The head is tied in both shapes, so a decoding step reads every packed weight once.
    return System(generate, {"hasten": hasten.__version__, "isa": llm.backend.isa}, llm.backend.weight_bytes)


if __name__ == "__main__":
    main(load)
