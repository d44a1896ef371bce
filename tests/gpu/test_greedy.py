"""Greedy tokens through LLM on the GPU equal Transformers', for every family, and for every form that a folder may have
(against its dequantised numbers in float32, by load_torch)."""

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

import tiny_models  # noqa: E402
from greedy_tools import FORMS, SIZES, check_greedy, make_form, prompts  # noqa: E402

from hasten import load_torch  # noqa: E402

Build = Callable[..., Path]
# Standard deviations that a token may be below the likeliest, and the share that must be the likeliest: two of some 300
# random words are within a hundredth of one in three of a hundred places.
LIMITS = {
    "float32": (1e-3, 0.99),
    "bfloat16": (0.3, 0.8),
    "float16": (0.15, 0.9),  # keys and values are in bfloat16
    "8-bit rows": (0.9, 0.55),
    "other experts": (2.0, 0.8),  # of two that a router likes as much, rounding may take another
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_families(family: str, dtype: str, tiny_model: Build) -> None:
    folder = tiny_model(family, dtype=dtype)
    long = family == "phi3_longrope"
    asked = prompts()[: 3 if long else None]  # Transformers takes the long factors for these
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    arguments = {"max_len": 256} if long else {}
    print(family, dtype, check_greedy(model.eval().cuda(), folder, *LIMITS[dtype], asked, device="cuda", **arguments))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_forms(family: str, form: str, dtype: str, tiny_model: Build, tmp_path: Path) -> None:
    folder = make_form(form, tiny_model(family, dtype=dtype, **SIZES), tmp_path / "out")
    model = load_torch(folder, dtype=torch.float32, device="cuda")
    rounds_rows = form.startswith("fp8") or form == "w8a8"  # its inputs too, where the GPU multiplies 8 bits by 8
    routed = form == "experts" and dtype != "float32"
    limits = LIMITS["8-bit rows" if rounds_rows else "other experts" if routed else dtype]
    print(family, form, dtype, check_greedy(model, folder, *limits, prompts(), device="cuda"))


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_fp8_on_load(family: str, tiny_model: Build) -> None:
    folder = tiny_model(family, dtype="bfloat16", **SIZES)
    model = load_torch(folder, dtype=torch.float32, device="cuda")
    limits = LIMITS["8-bit rows"]
    print(family, check_greedy(model, folder, *limits, prompts(), device="cuda", format="fp8"))


def test_deterministic_mode(tiny_model: Build) -> None:
    folder = tiny_model("qwen3", dtype="float32")
    model = load_torch(folder, device="cuda")
    check_greedy(model, folder, *LIMITS["float32"], prompts(), device="cuda", deterministic=True)
