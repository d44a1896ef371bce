"""What folders may hold, on the GPU: 8-bit floats and integers, low rank, experts; drafts in graphs; and
logits at the full width of an 8B model against float32."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

import tiny_models  # noqa: E402
from cpu_tools import table  # noqa: E402
from cuda_tools import batch, check_composed, check_product, fetched, load, pieces  # noqa: E402

from hasten.backends.cuda import CudaBackend  # noqa: E402
from hasten.model.formats import Format, dense_weight  # noqa: E402
from hasten.model.spec import spec_from_config  # noqa: E402

TOKENS = np.random.default_rng(0).integers(3, tiny_models.VOCAB, 60).astype(np.int32)


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize(
    ("format", "tolerance"),
    [
        (Format("fp8"), 0.05),  # several rows are rounded to 8-bit floats themselves
        (Format("fp8", 128), 6e-3),
        (Format("int8", activations="int8"), 0.02),  # 200 rows are rounded to int8
    ],
)
def test_formats_of_folders(format: Format, tolerance: float, rows: int) -> None:
    check_product("cuda", format, "bf16", rows, 1024, 2048, False, tolerance, rows)
    check_product("cuda", format, "bf16", rows, 1024, 2048, True, tolerance, rows)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_low_rank_experts_and_widths_of_their_own(family: str, tiny_model: Callable[..., Path]) -> None:
    check_composed("cuda", tiny_model(family), TOKENS[:40], 1e-4)


def test_drafts_in_graphs_equal_a_prefill(tiny_model: Callable[..., Path]) -> None:
    backend = load(tiny_model("qwen3"), "cuda")
    blocks = table(1)
    want = pieces(backend, TOKENS, [60], blocks)
    pieces(backend, TOKENS[:40], [40], blocks)
    for _ in range(40):  # kernel by kernel, then from a graph
        got = fetched(backend, batch([(TOKENS[40:46], 40, blocks)]))
        assert np.abs(got - want[40:46]).max() < 1e-5 * np.abs(want).max()


def test_logits_at_the_width_of_8b_are_near_float32() -> None:
    """Two layers of Llama-3.1-8B's widths and 32,768 of its words; Transformers in float32 on the same bf16 weights."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=2,
        vocab_size=32768, max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # not its rotary frequencies
        parameter.data = parameter.data.bfloat16().float()
    tokens = np.random.default_rng(0).integers(0, 32768, 200).astype(np.int32)
    spec = replace(spec_from_config({**config.to_dict(), "model_type": "llama"}), dtype="bf16")
    names = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
             "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "mlp_norm"}  # fmt: skip
    top = {"model.embed_tokens": "embed", "model.norm": "final_norm", "lm_head": "head"}

    def weights():
        for name, value in model.state_dict().items():
            module = name.removesuffix(".weight")
            canonical = top.get(module)
            if canonical is None:
                _, _, index, rest = module.split(".", 3)
                canonical = f"layers.{index}.{names[rest]}"
            values = value.float().cpu().numpy()
            yield canonical, dense_weight(values, "fp32" if values.ndim == 1 else "bf16")

    def logits() -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(tokens)[None].long().cuda()).logits[0].float().cpu().numpy()

    want = logits()
    hooks = [m.register_forward_hook(product_of_fp8) for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    eight = logits()
    for hook in hooks:
        hook.remove()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    # What rounding costs Transformers is what it may cost us.
    for options, theirs in (({}, logits()), ({"format": "fp8"}, eight)):
        backend = CudaBackend(**options)
        backend.load(spec, weights())
        backend.allocate(40, 16, "bf16")
        got = pieces(backend, tokens, [190, *[1] * 10], np.arange(40, dtype=np.int32))
        error, most = (np.linalg.norm(found - want) / np.linalg.norm(want) for found in (got, theirs))
        print(f"8B widths, {options or 'bf16'}: relative error {error:.4f}, Transformers {most:.4f}")
        assert error < 1.25 * most


def product_of_fp8(module: torch.nn.Linear, inputs: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    """Of rows of x and of W that are rounded to fp8, a scale a row."""
    x, w = (
        (rows / scale).to(torch.float8_e4m3fn).float() * scale
        for rows, scale in (
            (r, r.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448) for r in (*inputs, module.weight)
        )
    )
    return torch.nn.functional.linear(x, w)
