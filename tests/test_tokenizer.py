"""Token ids, text and chat prompts equal those of Transformers, on tokenizers as found on the hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.errors import ModelError, RequestError
from hasten.model.detokenizer import Detokenizer, Pieces
from hasten.model.tokenizer import Tokenizer

TEXTS = [
    "Hello world, it's 12345 o'clock.\n\n\tdef f(x):\n    return x ** 2  # don't",
    "naïve café — “quotes” 你好，世界 🙂👩‍👩‍👧 Ελληνικά русский",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "e\u0301 \u00e9 I'LL THEY'RE ab\r\ncd  \n",
    "x" * 50 + " " * 7 + "y",
    "",
]
FOLDERS = ["tok-smollm", "tok-phi3-mini", "tok-qwen2.5", "tok-gpt2", "tok-minimind", "stories260K"]
CONVERSATION = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4, ünless…"},
    {"role": "user", "content": "Thanks <b>you</b>"},
]


def theirs(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        return transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.GPT2Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=FOLDERS)
def pair(request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = shared_data / request.param
    if request.param == "tok-phi3-mini":
        # With its model_type Transformers takes the tokenizer's own pipeline, without it another one.
        folder = tmp_path_factory.mktemp("phi3") / "tok"
        shutil.copytree(shared_data / request.param, folder)
        folder.chmod(0o755)
        (folder / "config.json").write_text('{"model_type": "phi3"}')
    return Tokenizer(folder), theirs(folder)


def test_ids_and_text_equal_transformers(pair: Any) -> None:
    ours, hf = pair
    for text in TEXTS:
        ids = hf(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.encode_plain(text) == hf(text, add_special_tokens=False)["input_ids"]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == hf.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(hf)
    assert ours.bos_token_id == hf.bos_token_id
    for token in (0, 5, 300, len(hf) - 1):
        assert ours.id_to_token(token) == hf.convert_ids_to_tokens(token)
        assert ours.token_to_id(ours.id_to_token(token)) == hf.convert_tokens_to_ids(hf.convert_ids_to_tokens(token))
    assert ours.token_to_id("no such token") is None
    assert ours.id_to_token(10**7) is None


def test_streamed_text_equals_decoding_at_once(pair: Any) -> None:
    ours, _ = pair
    for text in TEXTS:
        ids = ours.encode(text)
        for skip in (False, True):
            stream = ours.detokenizer((), skip)
            pieces = [stream.push(token) for token in ids]
            assert not any("\ufffd" in piece for piece in pieces)
            assert "".join(pieces) + stream.finish() == ours.decode(ids, skip_special_tokens=skip)


def test_text_after_a_prompt_continues_it(pair: Any) -> None:
    ours, _ = pair
    prompt, rest = ours.encode("Once upon a time"), ours.encode_plain("Once upon a time there was")
    start = len(ours.encode_plain("Once upon a time"))
    stream = ours.detokenizer(prompt)
    text = "".join(stream.push(token) for token in rest[start:]) + stream.finish()
    assert text == " there was"
    first = ours.detokenizer([] if ours.bos_token_id is None else [ours.bos_token_id])
    assert "".join(first.push(token) for token in rest) + first.finish() == "Once upon a time there was"


def test_random_byte_level_ids_stream_like_transformers_decodes(shared_data: Path) -> None:
    ours = Tokenizer(shared_data / "tok-gpt2")
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(0, 300, 60).tolist()  # mostly single bytes: invalid UTF-8 of every kind
        stream = ours.detokenizer()
        assert "".join(stream.push(token) for token in ids) + stream.finish() == ours.decode(ids)


@pytest.mark.parametrize("name", ["tok-phi3-mini", "tok-qwen2.5", "tok-minimind"])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_prompts_equal_transformers(name: str, prompt: bool, shared_data: Path) -> None:
    ours, hf = Tokenizer(shared_data / name), theirs(shared_data / name)
    assert ours.has_chat_template
    conversations = [CONVERSATION[:1], CONVERSATION, [{"role": "system", "content": "Be brief."}, *CONVERSATION]]
    for messages in conversations:
        want = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.chat_prompt(messages, add_generation_prompt=prompt) == want
    tools = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"type": "object"}}}]
    want = hf.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=prompt, tools=tools)
    assert ours.chat_prompt(CONVERSATION, add_generation_prompt=prompt, tools=tools) == want
    assert ours.encode_chat(CONVERSATION) == ours.encode_plain(ours.chat_prompt(CONVERSATION))


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{% if m.role == 'skip' %}{% continue %}{% endif %}"
    "{% generation %}{{ m | tojson }}{% endgeneration %}\n{% endfor %}{{ strftime_now('%Y') | length }}"
)


def test_what_templates_may_use(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    messages = [{"role": "user", "content": "<é>"}, {"role": "skip", "content": ""}]
    ours = Tokenizer(folder)
    assert ours.chat_prompt(messages) == '<s>{"role": "user", "content": "<é>"}4'
    assert ours.chat_prompt(messages) == theirs(folder).apply_chat_template(messages, tokenize=False)
    with pytest.raises(RequestError, match="no tools"):
        ours.chat_prompt([{"role": "tool", "content": ""}])
    with pytest.raises(RequestError, match="expected"):
        ours.chat_prompt([{"text": "hi"}])
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(RequestError, match="refuses"):
        Tokenizer(folder).chat_prompt(messages)


def test_named_templates(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_model("llama"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": named}))
    ours, hf = Tokenizer(folder), theirs(folder)
    for tools in (None, [{"type": "function"}]):
        assert ours.chat_prompt(CONVERSATION, tools=tools) == hf.apply_chat_template(
            CONVERSATION, tokenize=False, tools=tools
        )
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert not Tokenizer(folder).has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(folder).encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("own_file", [True, False], ids=["tokenizer.json", "vocab and merges"])
def test_beginning_and_end_tokens(own_file: bool, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_model("llama"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if not own_file:
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
        (folder / "tokenizer.json").unlink()
        settings["tokenizer_class"] = "GPT2Tokenizer"
    for bos in (True, False):
        for eos in (True, False):
            changed = {**settings, "add_bos_token": bos, "add_eos_token": eos}
            (folder / "tokenizer_config.json").write_text(json.dumps(changed))
            ids = Tokenizer(folder).encode("the thing")
            assert ids == theirs(folder)("the thing")["input_ids"]
            assert (ids[0] == 1, ids[-1] == 2) == ((False, False) if own_file else (bos, eos))


def test_end_ids_and_sampling_defaults(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_model("llama"), folder)
    assert Tokenizer(folder).eos_token_ids == (2,)
    assert Tokenizer(folder).defaults == {}
    generation = {"eos_token_id": [7, 2], "do_sample": True, "temperature": 0.6, "top_p": 0.95, "num_beams": 4}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with pytest.warns(UserWarning, match="num_beams = 4"):
        ours = Tokenizer(folder)
    assert ours.eos_token_ids == (2, 7)
    assert ours.defaults == {"temperature": 0.6, "top_p": 0.95, "top_k": 50}


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer: expected tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ModelError, match="not a tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelError, match="expected a JSON object"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_other_decoders_in_constant_work(kind: str) -> None:
    """The pieces of a long text are exactly the whole, of which only the end is decoded at each step."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders
    from tokenizers.models import WordLevel, WordPiece

    tokenizer: Any
    if kind == "words":
        tokenizer = Fast(WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    else:
        vocab = {f"a{i}" if i < 150 else f"##b{i}": i for i in range(300)}
        tokenizer = Fast(WordPiece(vocab, unk_token="a0"))
        tokenizer.decoder = decoders.WordPiece()
    ids = np.random.default_rng(0).integers(0, 300, 400).tolist()
    decoder = Detokenizer(Pieces(tokenizer), [], True)
    kept, text = 0, ""
    for token in ids:
        text += decoder.push(token)
        kept = max(kept, len(decoder._ids))
    assert text + decoder.finish() == tokenizer.decode(ids)
    assert kept < 80
