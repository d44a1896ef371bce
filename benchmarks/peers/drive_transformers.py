"""Drives Transformers as its users run it: bf16, `generate`, eager. Model: a Hugging Face folder."""

from pathlib import Path

import torch
import transformers
from measure import Prompts, System, main


def load(model: str, threads: int) -> System:
    torch.set_num_threads(threads)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def generate(prompts: Prompts, num_tokens: int) -> int:
        ids = torch.tensor(prompts)
        out = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out.shape[0] * (out.shape[1] - ids.shape[1])

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return System(generate, versions, sum(path.stat().st_size for path in Path(model).glob("*.safetensors")))


if __name__ == "__main__":
    main(load)
