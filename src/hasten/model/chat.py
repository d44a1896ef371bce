"""A model's chat template: messages -> the prompt it was trained on. Jinja, with what Transformers offers in it.

Templates come with models from strangers: they run in Jinja's immutable sandbox, over plain data.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from hasten.errors import RequestError
from hasten.model.jsonfile import read_json


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Named templates of one model ("default" where there is one) and the special tokens that they may use."""

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path, settings: Mapping[str, Any], special_tokens: Mapping[str, str]) -> "ChatTemplate | None":
        """chat_template.jinja, else what tokenizer_config.json or chat_template.json holds; None without any."""
        found: dict[str, str] = {}
        given = settings.get("chat_template") or (read_json(folder / "chat_template.json") or {}).get("chat_template")
        if isinstance(given, str):
            found["default"] = given
        elif isinstance(given, list):
            found = {str(entry["name"]): str(entry["template"]) for entry in given}
        file = folder / "chat_template.jinja"
        if file.is_file():
            found["default"] = file.read_text("utf-8")
        for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            found[extra.stem] = extra.read_text("utf-8")
        return ChatTemplate(found, special_tokens) if found else None

    @staticmethod
    def render(
        chat: "ChatTemplate | None",
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt. Raises RequestError where there is no template, or it fails on these messages."""
        import jinja2

        if chat is None:
            raise RequestError("this model has no chat template: give it plain text instead of messages")
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise RequestError(f'a message is {message!r:.80}, expected {{"role": ..., "content": ...}}')
        given = {"tools": None, "documents": None, **chat.special_tokens, **variables}
        try:
            template = _compile(chat._choose(given["tools"] is not None))
            plain = [dict(message) for message in messages]
            return str(template.render(messages=plain, add_generation_prompt=add_generation_prompt, **given))
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}") from None

    def _choose(self, with_tools: bool) -> str:
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self.templates:
                return self.templates[name]
        raise RequestError(f"this model has several chat templates and no default: {', '.join(self.templates)}")


@cache
def _compile(source: str) -> Any:
    from jinja2 import ext, nodes
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %} marks the assistant's part, for training; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            found: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return found

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(source)
