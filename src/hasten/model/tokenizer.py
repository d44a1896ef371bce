"""Text <-> token ids as Transformers does it, from a model folder: tokenizer.json, or vocab.json and merges.txt.

Special tokens, the beginning-of-sequence token and the chat template come from tokenizer_config.json and its companions
(chat.py); end-of-sequence ids and sampling defaults from generation_config.json (generation.py). Knows no model.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.errors import ModelError
from hasten.model.chat import ChatTemplate
from hasten.model.detokenizer import Detokenizer, Pieces
from hasten.model.generation import generation_defaults
from hasten.model.jsonfile import read_json

_GPT2_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")  # where nothing is said
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Qwen 2's way of cutting text before merging, as published in its tokenizer.json.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """The tokenizer of a model folder.

    bos_token_id: None where there is none. eos_token_ids: every id that ends a text, by generation_config.json, else
    config.json, else the tokenizer. defaults: sampling parameters of generation_config.json. vocab_size: tokens known
    here, added ones included; a model's matrices may be larger. Raises ModelError where files are missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        settings = _settings(folder)
        if not settings and (folder / "vocab.json").is_file():
            settings = dict(_GPT2_TOKENS)
        self._tokenizer = _load(folder, settings)
        self._special_tokens = {key: _content(value) for key, value in settings.items() if _is_token(key, value)}
        _add_missing(self._tokenizer, settings, self._special_tokens)
        if not (folder / "tokenizer.json").is_file():
            _set_post_processor(self._tokenizer, settings, self._special_tokens)
        self._pieces = Pieces(self._tokenizer)
        self._chat = ChatTemplate.read(folder, settings, self._special_tokens)
        generation = generation_defaults(folder)
        eos_ids = generation.pop("eos_token_ids") or _known([self.token_to_id(self._special_tokens.get("eos_token"))])
        self.eos_token_ids: tuple[int, ...] = tuple(sorted(eos_ids))
        self.defaults: dict[str, Any] = generation
        self.bos_token_id = self.token_to_id(self._special_tokens.get("bos_token"))
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the model expects around it (such as <s>)."""
        return self._ids(text, add_special_tokens=True)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text with nothing added; special tokens written in it count as such."""
        return self._ids(text, add_special_tokens=False)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Ids of a conversation, up to where the model is to answer. See chat_prompt."""
        return self.encode_plain(self.chat_prompt(messages, **variables))

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """A conversation, {"role", "content"} each, as the model's chat template writes it. `variables` (tools,
        documents, enable_thinking, ...) reach the template. Raises RequestError without a template, or where it
        refuses."""
        return ChatTemplate.render(self._chat, messages, add_generation_prompt, variables)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; incomplete or invalid UTF-8 becomes U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> Detokenizer:
        """A decoder of one token at a time, for a text that follows `prompt_ids`."""
        return Detokenizer(self._pieces, prompt_ids, skip_special_tokens)

    def token_to_id(self, token: str | None) -> int | None:
        """The id of a token as the vocabulary spells it; None where it has none."""
        found = None if token is None else self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id; None for an id that it does not have."""
        found = self._tokenizer.id_to_token(token_id)
        return None if found is None else str(found)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


def _known(ids: Iterable[int | None]) -> list[int]:
    return [found for found in ids if found is not None]


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json."""
    files = ("special_tokens_map.json", "tokenizer_config.json")
    return {key: value for file in files for key, value in (read_json(folder / file) or {}).items()}


def _is_token(key: str, value: Any) -> bool:
    return key.endswith("_token") and not key.startswith("add_") and isinstance(_content(value), str)


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, Mapping) else value


def _load(folder: Path, settings: Mapping[str, Any]) -> Any:
    import tokenizers

    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{file}: not a tokenizer: {error}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        other = (
            "; tokenizer.model must be converted to tokenizer.json" if (folder / "tokenizer.model").is_file() else ""
        )
        raise ModelError(f"{folder}: no tokenizer: expected tokenizer.json, or vocab.json with merges.txt{other}")
    return _byte_level(folder, vocab, merges, settings)


def _byte_level(folder: Path, vocab: Path, merges: Path, settings: Mapping[str, Any]) -> Any:
    """Byte-level BPE from GPT-2's pair of files. Only Qwen's tokenizer cuts words in another way than GPT-2's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:
        raise ModelError(f"{folder}: vocab.json and merges.txt are not a byte-level BPE: {error}") from None
    tokenizer.decoder = decoders.ByteLevel()
    name = str(settings.get("tokenizer_class") or (read_json(folder / "config.json") or {}).get("model_type") or "")
    spaced = bool(settings.get("add_prefix_space", False))
    if name.lower().startswith("qwen"):
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated", invert=False)
        level = pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, level])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    return tokenizer


def _add_missing(tokenizer: Any, settings: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Tokens that tokenizer_config.json adds to those of the tokenizer's own file, as Transformers does."""
    from tokenizers import AddedToken

    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = settings.get("added_tokens_decoder") or {}
    for token_id, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        if entry["content"] in known:
            continue
        flags = {
            key: entry[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in entry
        }
        tokenizer.add_tokens([AddedToken(entry["content"], **flags)])
        if tokenizer.token_to_id(entry["content"]) != int(token_id):
            found = tokenizer.token_to_id(entry["content"])
            raise ModelError(
                f"tokenizer_config.json: token {entry['content']!r} has id {token_id}, here it gets {found}"
            )
        known.add(entry["content"])
    for key in _NAMED:
        if named.get(key) is not None and named[key] not in known:
            tokenizer.add_special_tokens([AddedToken(named[key], special=True, normalized=False)])


def _set_post_processor(tokenizer: Any, settings: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """What add_bos_token and add_eos_token put around a text. With a tokenizer.json they have no effect, as in
    Transformers: its own post-processor says it all."""
    from tokenizers import processors

    bos = named.get("bos_token") if settings.get("add_bos_token") else None
    eos = named.get("eos_token") if settings.get("add_eos_token") else None
    around = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token is not None]
    template = " ".join(part for part in (bos, "$A", eos) if part is not None)
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
