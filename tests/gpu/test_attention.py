"""Attention on the GPU at real sizes: every size of heads, KV format, window and soft cap, long contexts, and caches
of more than 2^31 numbers."""

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from attention_tools import CASES, check_attention  # noqa: E402


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_head_sizes(kv: str, head_dim: int, name: str) -> None:
    check_attention("cuda", heads=16, kv_heads=4, head_dim=head_dim, kv=kv, **CASES[name])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_float32(head_dim: int, name: str) -> None:
    check_attention("cuda", heads=8, kv_heads=4, head_dim=head_dim, dtype="fp32", kv="fp32", **CASES[name])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("window", "softcap"), [(20, 0.0), (64, 0.0), (129, 5.0), (0, 5.0)])
def test_windows_and_soft_caps(window: int, softcap: float, name: str) -> None:
    check_attention("cuda", heads=8, kv_heads=4, head_dim=128, window=window, softcap=softcap, **CASES[name])


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (12, 4), (14, 2), (32, 2), (64, 1)])
def test_groups_of_heads(heads: int, kv_heads: int) -> None:
    for case in CASES.values():
        check_attention("cuda", heads=heads, kv_heads=kv_heads, head_dim=64, **case)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("heads", [8, 16, 24])
def test_normed_heads(heads: int, name: str) -> None:
    check_attention("cuda", heads=heads, kv_heads=8, head_dim=128, normed=True, **CASES[name])


@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_long_contexts(kv: str) -> None:
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 128, "kv": kv}
    check_attention("cuda", [(70_001, 1)], kind="decodes", **shape)
    check_attention("cuda", [(70_001, 1)], kind="long", **shape)
    check_attention("cuda", [(70_001, 1), (5, 1), (66_000, 1), *[(40, 1)] * 20], kind="decodes", **shape)
    check_attention("cuda", [(70_001, 33), (900, 1), (66_000, 6)], **shape)
    check_attention("cuda", [(70_001, 4), (66_000, 6)], kind="runs", **shape)


@pytest.mark.parametrize("name", CASES)
def test_offsets_beyond_32_bits(name: str) -> None:
    """16 * 8 * 256 numbers a block: keys alone are 2.3 billion."""
    free, _ = torch.cuda.mem_get_info()
    if free < 12 << 30:
        pytest.skip("needs 12 GB of GPU memory")
    check_attention("cuda", heads=8, kv_heads=8, head_dim=256, kv="fp8", first_block=70_000, **CASES[name])
