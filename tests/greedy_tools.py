"""Greedy tokens of LLM against a Transformers model, token by token: each must be what the model says next to all that
was said before it, which is what its own greedy generate gives. Where two words are as likely up to rounding, either
may come; how near they were is measured, in standard deviations of the logits."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from test_compress_strip import choice
from tiny_models import write_tokenizer

from hasten import LLM, SamplingParams, compress
from hasten.compress import strip
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.formats import Format, Weight, dense_weight, dequantize, quantize, sparsify
from hasten.model.spec import configured
from hasten.model.writer import write_checkpoint

NEW = 24
# Of sizes that every format takes; families say the rest.
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2
}  # fmt: skip
QUANTIZED: dict[str, list[dict[str, Any]]] = {
    "int8": [{"quantize": {"format": "int8", "group_size": 0}}],
    "int8_g32": [{"quantize": {"format": "int8", "group_size": 32}}],
    "w8a8": [{"quantize": {"format": "int8", "group_size": 0, "activations": "int8"}}],
    "int4_g32": [{"quantize": {"format": "int4", "group_size": 32}}],
    "int4_g128": [{"quantize": {"format": "int4", "group_size": 128}}],
    "int4_asymmetric": [{"quantize": {"format": "int4", "group_size": 64, "symmetric": False}}],
    "fp8": [{"quantize": {"format": "fp8"}}],
    "fp8_activations": [{"quantize": {"format": "fp8", "activations": "fp8"}}],
}
FORMS = (*QUANTIZED, "2:4", "2:4_int8", "low_rank", "experts", "widths")


def prompts() -> list[list[int]]:
    """Ragged, longer than a chunk, two with a common beginning."""
    random = np.random.default_rng(3)
    made = [random.integers(3, 300, length).tolist() for length in (60, 97, 49)]
    short = [random.integers(3, 300, length).tolist() for length in (1, 5, 23)]
    return [*made, *short, [*made[1][:-3], 7, 8]]


def check_greedy(
    model: Any, folder: Path, near: float, share: float, asked: list[list[int]], **arguments: Any
) -> tuple[float, float]:
    """No token further than `near` from the likeliest, and at least this share of them the likeliest. What was found.
    arguments: LLM's."""
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.0)
    with LLM(str(folder), max_step_tokens=40, max_sequences=40, memory=32 << 20, **arguments) as llm:
        outputs = [*llm.generate(asked, params), *llm.generate(asked, params)]  # kernel by kernel, then graphs too
    gaps = []
    for prompt, output in zip([*asked, *asked], outputs, strict=True):
        tokens = output.outputs[0].token_ids
        assert len(tokens) == NEW
        ids = torch.tensor([[*prompt, *tokens[:-1]]], device=model.device)
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 :].double()
        taken = logits.gather(1, torch.tensor(tokens, device=model.device)[:, None])[:, 0]
        gaps.append((logits.amax(1) - taken) / logits.std(1))
    gap = torch.cat(gaps)
    worst, exact = float(gap.max()), float((gap == 0).double().mean())
    assert worst < near, f"a token is {worst:.2g} standard deviations below the likeliest"
    assert exact >= share, f"{exact:.1%} of the tokens are the likeliest"
    return worst, exact


def make_form(form: str, model: Path, out: Path) -> Path:
    """A folder of the model in one of FORMS."""
    if form in QUANTIZED:
        compress(model, {"steps": QUANTIZED[form]}, out)
        return out
    checkpoint = open_checkpoint(model)
    if form == "widths":
        kept = choice(checkpoint.spec, hidden="gpt" not in checkpoint.spec.family)
        config = strip.stripped_config(checkpoint.config, checkpoint.spec, kept)
        write_checkpoint(out, config, strip.strip(checkpoint.weights(), checkpoint.spec, kept))
        write_tokenizer(out)
        return out
    if form.startswith("2:4"):
        write_checkpoint(out, checkpoint.config, _two_of_four(checkpoint, form))
    else:
        _write_composed(checkpoint, form, out)
    write_tokenizer(out)
    return out


def _two_of_four(checkpoint: Checkpoint, form: str) -> Iterator[tuple[str, Weight]]:
    for name, weight in checkpoint.weights():
        if not name.startswith("layers.") or weight.shape[1] == 1:
            yield name, weight
            continue
        fours = dequantize(weight).reshape(-1, 4).copy()
        np.put_along_axis(fours, np.abs(fours).argsort(1)[:, :2], 0, 1)
        kept = fours.reshape(weight.shape)
        yield (
            name,
            sparsify(quantize(kept, Format("int8")) if form == "2:4_int8" else dense_weight(kept, weight.format.kind)),
        )


def _write_composed(checkpoint: Checkpoint, form: str, out: Path) -> None:
    changes: dict[str, Any] = (
        {"ranks": (("down", 40), ("k", 7), ("up", 33))} if form == "low_rank" else {"experts": 8, "active_experts": 3}
    )
    layers = [replace(layer, **changes) for layer in checkpoint.spec.layers]
    rng = np.random.default_rng(0)

    def weights() -> Iterator[tuple[str, Weight]]:
        for name, weight in checkpoint.weights():
            role = name.split(".", 2)[2] if name.startswith("layers.") else ""
            rank = layers[0].rank_of(role.removesuffix(".bias"))
            if rank and role.endswith(".bias"):
                yield name.replace(".bias", ".b.bias"), weight
            elif rank:
                u, s, v = np.linalg.svd(dequantize(weight), full_matrices=False)
                yield f"{name}.a", dense_weight(v[:rank], weight.format.kind)
                yield f"{name}.b", dense_weight(u[:, :rank] * s[:rank], weight.format.kind)
            else:
                yield name, weight
        for index, layer in enumerate(layers):
            if layer.experts:
                router = rng.standard_normal((layer.experts, checkpoint.spec.hidden_size)).astype(np.float32)
                yield f"layers.{index}.router", dense_weight(router, checkpoint.spec.dtype)

    write_checkpoint(out, configured(checkpoint.config, layers), weights())
