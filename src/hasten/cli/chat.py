"""`hasten chat`: a conversation at the terminal. Knows the conversation's text; how it is answered is the engine's."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hasten.cli import options
from hasten.cli.terminal import note
from hasten.errors import RequestError

if TYPE_CHECKING:
    from hasten.engine.llm import LLM
    from hasten.engine.request import Delta, SamplingParams

COMMANDS = """\
/help            this list
/reset           forget the conversation
/system TEXT     tell the model TEXT first, and start again; without TEXT, nothing
/quit            leave, as Ctrl-D does
Ctrl-C stops an answer and keeps what was said. A line that ends with \\ goes on in the next."""


@dataclass(slots=True)
class Conversation:
    """What was said. With a chat template it is messages; without one, a single text that each side continues."""

    has_template: bool
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self, system: str | None) -> None:
        self.system = system
        self.messages.clear()

    def say(self, role: str, text: str) -> None:
        self.messages.append({"role": role, "content": text})

    def take_back(self) -> None:
        """Forget the last message, which could not be answered."""
        self.messages.pop()

    @property
    def with_system(self) -> list[dict[str, str]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.messages

    @property
    def text(self) -> str:
        """All of it as plain text, for a model without a chat template."""
        return "".join(message["content"] for message in self.with_system)


def chat(
    model: options.ModelArgument,
    system: options.SystemOption = None,
    max_tokens: options.MaxTokensOption = 1024,
    temperature: options.TemperatureOption = None,
    top_k: options.TopKOption = None,
    top_p: options.TopPOption = None,
    min_p: options.MinPOption = None,
    repetition_penalty: options.RepetitionOption = None,
    seed: options.SeedOption = None,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    format: options.FormatOption = None,
    deterministic: options.DeterministicOption = False,
    kv_cache: options.KvCacheOption = None,
    speculation: options.SpeculationOption = None,
    drafter: options.DrafterOption = None,
    max_len: options.MaxLenOption = None,
    memory: options.MemoryOption = None,
) -> None:
    """Talk with a model.

    Answers appear as they are made. Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands. A model without a
    chat template continues the conversation's text instead.
    """
    from hasten.engine.llm import LLM
    from hasten.engine.request import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    llm = LLM(
        model,
        device=device,
        threads=threads,
        format=format,
        deterministic=deterministic,
        kv_cache=kv_cache,
        speculation=speculation,
        drafter=drafter,
        max_len=max_len,
        memory=memory,
    )
    conversation = Conversation(llm.tokenizer.has_chat_template, system)
    if not conversation.has_template:
        note("This model has no chat template: it continues your text instead of answering it.")
    note("/help lists the commands; Ctrl-D leaves.")
    for line in read_lines():
        if line.startswith("/"):
            if not obey(line, conversation):
                break
        elif line.strip():
            answer(llm, conversation, params, line)


def read_lines() -> Iterator[str]:
    """What the person types, until Ctrl-D. Ctrl-C empties the line. A line that ends with a backslash goes on."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() history and editing
    so_far = ""
    while True:
        try:
            line = _prompt("... " if so_far else "> ")
        except KeyboardInterrupt:
            note("\n(Ctrl-D leaves)")
            so_far = ""
            continue
        except EOFError:
            if sys.stdin.isatty():
                note("")
            return
        if line.endswith("\\"):
            so_far += line[:-1] + "\n"
        else:
            yield so_far + line
            so_far = ""


def _prompt(mark: str) -> str:
    """One line. The mark goes to the terminal only, so that answers can be piped."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(mark)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def obey(line: str, conversation: Conversation) -> bool:
    """Carry out a command; False leaves."""
    command, _, rest = line.partition(" ")
    match command:
        case "/quit" | "/exit":
            return False
        case "/help":
            note(COMMANDS)
        case "/reset":
            conversation.reset(conversation.system)
            note("The conversation is forgotten.")
        case "/system":
            conversation.reset(rest.strip() or None)
            note("The conversation starts again.")
        case _:
            note(f"unknown command {command}; /help lists them")
    return True


def answer(llm: "LLM", conversation: Conversation, params: "SamplingParams", line: str) -> None:
    """Say `line`, write the answer as it comes, remember both. Ctrl-C ends the answer; what was said of it stays. What
    cannot be answered (too long a conversation, say) is told and forgotten."""
    conversation.say("user", line)
    said = ""
    try:
        for delta in stream(llm, conversation, params):
            said += delta.text
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        note(" [stopped]")
    except RequestError as error:
        conversation.take_back()
        note(f"{error} (or start again with /reset)")
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    conversation.say("assistant", said)


def stream(llm: "LLM", conversation: Conversation, params: "SamplingParams") -> Iterator["Delta"]:
    """The answer to the conversation so far."""
    if conversation.has_template:
        return llm.stream_chat(conversation.with_system, params)
    return llm.stream(conversation.text, params)
