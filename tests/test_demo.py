"""The bundled model: its files, its documented numbers, and hasten against Transformers on it."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest

import hasten
from hasten.backends.cpu import CpuBackend
from hasten.compress.folder import compress
from hasten.engine.llm import LLM
from hasten.engine.request import SamplingParams
from hasten.measure.quality import score, summarize
from hasten.measure.speed import default_kv_cache
from hasten.measure.text import first_token, make_windows
from hasten.model.checkpoint import open_checkpoint
from hasten.model.hub import resolve
from hasten.model.tokenizer import Tokenizer
from hasten.receipt import Quality

DEMO = Path(hasten.__file__).parent / "demo"
BOS = 0
CONTEXT = 1024
PROMPTS = ["Reader, I", "ROMEO:\n", "The males of many birds", "It was the", "Æschylus – 你好 🙂"]


@pytest.fixture(scope="module")
def transformers_model():
    """The demo in Transformers, bf16 weights in fp32 arithmetic."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=BOS)  # greedy, and nothing ends a text
    return model


@pytest.fixture(scope="module")
def transformers_tokenizer():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def fp32_folder(transformers_model, transformers_tokenizer, tmp_path_factory) -> Path:
    """The demo with its weights widened to fp32, so that both sides compute in fp32."""
    folder = tmp_path_factory.mktemp("demo-fp32")
    transformers_model.save_pretrained(folder)  # dtype fp32 goes into config.json
    transformers_tokenizer.save_pretrained(folder)
    return folder


def documented(name: str) -> float:
    """A number of the model's own row in the README's table."""
    row = re.search(r"\| \*\*demo\*\* \| \*\*(?P<bits>[\d.]+)\*\* \| \*\*(?P<perplexity>[\d.]+)\*\* \|", readme())
    assert row is not None
    return float(row[name])


def readme() -> str:
    return (DEMO / "README.md").read_text()


def heldout() -> str:
    return (DEMO / "heldout.txt").read_bytes().decode()


def test_sizes_are_what_a_package_can_carry():
    assert (DEMO / "model.safetensors").stat().st_size <= 12_000_000
    assert len(heldout().encode()) <= 100_000
    with (DEMO / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    tensors = [t for name, t in header.items() if name != "__metadata__"]
    parameters = sum(int(np.prod(t["shape"])) for t in tensors)
    assert {t["dtype"] for t in tensors} == {"BF16"}
    assert 4_000_000 <= parameters <= 6_000_000
    assert f"{parameters:,}" in readme()


def test_the_name_demo_is_this_folder():
    assert resolve("demo") == DEMO


@pytest.mark.parametrize("text", [*PROMPTS, "", " \n\n\t x  ", "".join(map(chr, range(1, 0x250)))])
def test_any_text_survives_the_tokenizer(text, transformers_tokenizer):
    ids = transformers_tokenizer(text)["input_ids"]
    assert ids[0] == BOS
    assert transformers_tokenizer.decode(ids[1:]) == text


def test_heldout_numbers_are_the_documented_ones(transformers_model, transformers_tokenizer):
    """All windows by hasten, every sixth by Transformers as well, which takes longer."""
    torch = pytest.importorskip("torch")
    text = heldout()
    ids = transformers_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    windows = [[BOS, *ids[start : start + CONTEXT - 1]] for start in range(0, len(ids), CONTEXT - 1)]
    nats = [-found.logprobs.sum(dtype=np.float64) for found in LLM("demo").score(windows)]
    assert np.exp(sum(nats) / len(ids)) == pytest.approx(documented("perplexity"), rel=2e-3)
    assert sum(nats) / np.log(2) / len(text.encode()) == pytest.approx(documented("bits"), rel=1e-3)
    for window, found in list(zip(windows, nats, strict=True))[::6]:
        tokens = torch.tensor([window])
        with torch.no_grad():
            log_p = transformers_model(tokens).logits[0, :-1].log_softmax(-1)
        assert found == pytest.approx(-log_p.gather(1, tokens[0, 1:, None]).sum().item(), rel=1e-3)


def test_greedy_tokens_equal_transformers_in_fp32(transformers_model, transformers_tokenizer, fp32_folder):
    torch = pytest.importorskip("torch")
    llm = LLM(str(fp32_folder))
    long = heldout()[:2500]  # longer than one chunk of prefill
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    outputs = llm.generate([*PROMPTS, long], params)
    for prompt, output in zip([*PROMPTS, long], outputs, strict=True):
        ids = transformers_tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = transformers_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32)
        assert output.prompt_token_ids == tuple(ids[0].tolist())
        assert list(output.outputs[0].token_ids) == expected[0, ids.shape[1] :].tolist(), prompt[:40]


def test_bf16_scores_are_within_bf16_noise_of_fp32(transformers_model):
    torch = pytest.importorskip("torch")
    found = LLM("demo").score([heldout()[:3000]])[0]
    with torch.no_grad():
        logits = transformers_model(torch.tensor([found.token_ids])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(found.token_ids)[1:, None])[:, 0].numpy()
    error = np.abs(found.logprobs - expected)
    assert error.mean() < 0.02  # logits of this model spread by 3.2; bf16 keeps 1 part in 256
    assert error.max() < 0.2


def loaded(folder: Path) -> CpuBackend:
    checkpoint = open_checkpoint(folder)
    backend = CpuBackend()
    backend.load(checkpoint.spec, checkpoint.weights())
    return backend


def compared(model: Path, text: str, tmp_path: Path) -> tuple[Quality, Quality]:
    """The model and its int8 preset on windows of `text`, keys and values stored alike."""
    compress(model, "int8", tmp_path / "int8")
    tokenizer, spec = Tokenizer(model), open_checkpoint(model).spec
    windows = make_windows(text, tokenizer.encode_plain, first_token(tokenizer), length=256, most=60)
    folders = {"dense": model, "int8": tmp_path / "int8"}
    models = {name: (loaded(folder), default_kv_cache(spec)) for name, folder in folders.items()}
    scores = score(models, windows, spec.vocab_size)
    return summarize(scores["dense"]), summarize(scores["int8"], scores["dense"])


def test_int8_agrees_on_99_percent_and_costs_under_a_fifth_of_a_percent(tmp_path):
    dense, int8 = compared(DEMO, heldout(), tmp_path)
    assert 1.3 < dense.bits_per_byte.median < 1.6
    assert int8.top1_agreement.median >= 0.99
    assert int8.loss.high < 0.002


def test_int8_of_a_model_64_wide(shared_data, tmp_path):
    """260,000 parameters: with int8 weights and exact arithmetic it agrees on 98.4 %, so 99 % is out of reach
    (docs/log.md)."""
    model = shared_data / "stories260K"
    text = (shared_data / "tinystories-slice" / "tinystories_slice.txt").read_text()[:250_000]
    _, int8 = compared(model, text, tmp_path)
    assert int8.top1_agreement.median >= 0.98
    assert int8.loss.high < 0.002
