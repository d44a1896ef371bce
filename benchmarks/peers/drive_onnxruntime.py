"""Drives ONNX Runtime GenAI with its defaults, but for the number of threads. Model: a folder of its model builder.

Left alone it makes a thread for each core of the machine, whatever cores the process may run on.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime_genai
from measure import Prompts, System, main


def load(model: str, threads: int) -> System:
    config = onnxruntime_genai.Config(model)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    network = onnxruntime_genai.Model(config)

    def generate(prompts: Prompts, num_tokens: int) -> int:
        length = len(prompts[0]) + num_tokens
        params = onnxruntime_genai.GeneratorParams(network)
        params.set_search_options(max_length=length, min_length=length, batch_size=len(prompts), do_sample=False)
        generator = onnxruntime_genai.Generator(network, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32).squeeze())
        for _ in range(num_tokens):
            generator.generate_next_token()
        return sum(len(generator.get_sequence(row)) - len(prompts[row]) for row in range(len(prompts)))

    files = Path(model).glob("model.onnx*")
    return System(generate, {"onnxruntime-genai": onnxruntime_genai.__version__}, sum(f.stat().st_size for f in files))


if __name__ == "__main__":
    main(load)
