"""Drives OpenVINO GenAI's LLMPipeline with its defaults. Model: a folder of optimum-intel."""

from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from measure import Prompts, System, main


def load(model: str, threads: int) -> System:
    pipeline = openvino_genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT="LATENCY")

    def generate(prompts: Prompts, num_tokens: int) -> int:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_tokens
        config.do_sample, config.ignore_eos, config.apply_chat_template = False, True, False
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return sum(len(tokens) for tokens in pipeline.generate(inputs, config).tokens)

    versions = {"openvino": openvino.__version__, "openvino-genai": openvino_genai.__version__}
    return System(generate, versions, (Path(model) / "openvino_model.bin").stat().st_size)


if __name__ == "__main__":
    main(load)
