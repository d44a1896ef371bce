"""`hasten generate`: continue prompts given as arguments, in files, or on stdin."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options
from hasten.cli.terminal import note, write_json
from hasten.errors import RequestError

if TYPE_CHECKING:
    from hasten.engine.llm import LLM
    from hasten.engine.request import Delta, RequestOutput


def generate(
    model: options.ModelArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT...", help="Texts to continue; - or none at all reads stdin.", show_default=False
        ),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", "-f", metavar="PATH", help="A file whose text is a prompt; may be given again."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Take each prompt as a message: apply the chat template.")
    ] = False,
    system: options.SystemOption = None,
    max_tokens: options.MaxTokensOption = options.USUAL_TOKENS,
    n: Annotated[int, typer.Option("-n", min=1, max=1024, metavar="N", help="Continuations of each prompt.")] = 1,
    temperature: options.TemperatureOption = None,
    top_k: options.TopKOption = None,
    top_p: options.TopPOption = None,
    min_p: options.MinPOption = None,
    repetition_penalty: options.RepetitionOption = None,
    presence_penalty: options.PresenceOption = 0.0,
    frequency_penalty: options.FrequencyOption = 0.0,
    seed: options.SeedOption = None,
    stop: options.StopOption = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, metavar="K", help="With --json: log-probabilities, and the K likeliest tokens'."),
    ] = None,
    json: options.JsonOption = False,
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
    """Continue text.

    One prompt's answer appears as it is made. Several prompts run as one batch. With --json each prompt's result is one
    line of JSON.
    """
    if logprobs is not None and not json:
        raise RequestError("--logprobs is shown with --json only: add --json")
    texts = gather_prompts(prompts or [], file or [])
    from hasten.engine.llm import LLM
    from hasten.engine.request import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        n=n,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        logprobs=logprobs,
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
    conversations = [as_messages(text, system) for text in texts] if chat or system else None
    if len(texts) == 1 and n == 1 and not json:
        stream = llm.stream_chat(conversations[0], params) if conversations else llm.stream(texts[0], params)
        _write_stream(stream)
        return
    outputs = llm.chat(conversations, params) if conversations else llm.generate(texts, params)
    if json:
        for text, output in zip(texts, outputs, strict=True):
            write_json({"prompt": text, **describe_output(llm, output)}, lines=True)
    else:
        _write_texts(outputs)


def as_messages(text: str, system: str | None) -> list[dict[str, str]]:
    """A prompt as a conversation."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def gather_prompts(arguments: list[str], files: list[str]) -> list[str]:
    """The prompts: arguments in order, then files; stdin where "-" stands, or where nothing else is given. The newline
    that ends a file or a pipe is not part of the prompt."""
    sources = [("text", text) if text != "-" else ("file", text) for text in arguments]
    sources += [("file", name) for name in files]
    return [text if kind == "text" else _read(text) for kind, text in sources or [("file", "-")]]


def _read(name: str) -> str:
    try:
        if name != "-":
            return Path(name).read_text(encoding="utf-8").removesuffix("\n")
        if sys.stdin.isatty():
            note("Reading the prompt from the terminal; end it with Ctrl-D.")
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except OSError as error:
        raise RequestError(f"cannot read prompt file {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        where = "stdin" if name == "-" else name
        raise RequestError(f"{where} is not UTF-8 text (byte {error.start}): convert it, e.g. with iconv") from None


def _write_stream(stream: Iterable["Delta"]) -> None:
    output = None
    for delta in stream:
        sys.stdout.write(delta.text)
        sys.stdout.flush()
        output = delta.output or output
    sys.stdout.write("\n")
    if output is not None and sys.stderr.isatty():
        note(_speed(output))


def _speed(output: "RequestOutput") -> str:
    metrics = output.metrics
    rate = f", {1 / metrics.tpot:.1f} tokens/s" if metrics.tpot > 0 else ""
    return f"[{metrics.num_output_tokens} tokens, first after {metrics.ttft:.2f} s{rate}]"


def _write_texts(outputs: Iterable["RequestOutput"]) -> None:
    for number, output in enumerate(outputs, 1):
        for continuation in output.outputs:
            which = f", continuation {continuation.index + 1}" if len(output.outputs) > 1 else ""
            print(f"==> prompt {number}{which} <==\n{continuation.text}\n")


def describe_output(llm: "LLM", output: "RequestOutput") -> dict[str, Any]:
    """A finished request as plain data."""
    outputs = []
    for item in output.outputs:
        plain = {
            "index": item.index,
            "text": item.text,
            "token_ids": list(item.token_ids),
            "finish_reason": item.finish_reason,
            "stop_reason": item.stop_reason,
        }
        if item.logprobs is not None:
            plain["logprobs"] = [
                {
                    "token_id": token.token_id,
                    "token": llm.tokenizer.decode([token.token_id]),
                    "logprob": token.logprob,
                    "top": [{"token_id": i, "token": llm.tokenizer.decode([i]), "logprob": p} for i, p in token.top],
                }
                for token in item.logprobs
            ]
        outputs.append(plain)
    metrics = output.metrics
    return {
        "outputs": outputs,
        "num_prompt_tokens": metrics.num_prompt_tokens,
        "num_output_tokens": metrics.num_output_tokens,
        "ttft": metrics.ttft,
        "tpot": metrics.tpot,
    }
