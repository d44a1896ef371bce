"""Accuracy on tasks: a model's answers by the log-probabilities of what may follow, and how they differ from another's.

All questions go through the engine as prompts to be scored, batched as requests are. Knows no files.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hasten.engine.engine import Engine
from hasten.engine.request import RequestOutput, SamplingParams
from hasten.measure.statistics import Float64, ratio_interval, share_interval
from hasten.measure.task_files import Question, Task, shown
from hasten.measure.text import Encode
from hasten.receipt import Measurement, TaskScore

STREAMS = 16  # prompts that are scored at once


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """tokens: all; of these, those from `start` on are the answer, which spells num_bytes bytes."""

    tokens: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Answers:
    """For each question what was chosen (a place, or the tokens written greedily), and whether that is right."""

    chosen: tuple[int | tuple[int, ...], ...]
    right: tuple[bool, ...]


def make_prompts(task: Task, encode: Encode, bos: int | None, longest: int) -> list[list[Prompt]]:
    """For each question a prompt for each choice. encode: without special tokens. What does not fit into `longest`
    tokens loses its beginning."""
    before = shown(task.shots)
    return [
        [_prompt(before + question.prompt, choice, encode, bos, longest) for choice in question.choices]
        for question in task.questions
    ]


def _prompt(given: str, choice: str, encode: Encode, bos: int | None, longest: int) -> Prompt:
    whole, context = list(encode(given + choice)), list(encode(given))
    # The answer begins where the two part: its first letters may have changed how the last of the prompt are cut.
    start = next((i for i, (one, other) in enumerate(zip(whole, context, strict=False)) if one != other), len(context))
    start = min(start, len(whole) - 1)
    if bos is not None:
        whole, start = [bos, *whole], start + 1
    start = max(start, 1)  # something must be given
    cut = len(whole) - longest
    if cut > 0:
        kept = 1 if bos is not None else 0
        whole = whole[:kept] + whole[cut + kept :]
        start = max(start - cut, 1)
    return Prompt(tuple(whole), start, len(choice.strip().encode()))


def answer(
    engine: Engine,
    task: Task,
    prompts: Sequence[Sequence[Prompt]],
    progress: Callable[[int, int, str], None] | None = None,
) -> Answers:
    """What the engine's model answers. A choice is the one with the greatest log-probability for each of its bytes; a
    word is right where each of its tokens is the likeliest."""
    flat = [prompt for choices in prompts for prompt in choices]
    written = task.kind == "word"
    scores: list[float] = [0.0] * len(flat)
    tokens: list[tuple[int, ...]] = [()] * len(flat)
    for done, (index, output) in enumerate(_scored(engine, flat, 1 if written else 0)):
        assert output.prompt_logprobs is not None
        entries = [entry for entry in output.prompt_logprobs[flat[index].start :] if entry is not None]
        scores[index] = sum(entry.logprob for entry in entries) / max(1, flat[index].num_bytes)
        tokens[index] = tuple(entry.top[0][0] for entry in entries if entry.top)
        if progress is not None:
            progress(done + 1, len(flat), "answers")
    if written:
        right = [found == prompt.tokens[prompt.start :] for found, prompt in zip(tokens, flat, strict=True)]
        return Answers(tuple(tokens), tuple(right))
    chosen = _likeliest(scores, task.questions)
    right = [place == question.answer for place, question in zip(chosen, task.questions, strict=True)]
    return Answers(tuple(chosen), tuple(right))


def _likeliest(scores: Sequence[float], questions: Sequence[Question]) -> list[int]:
    places, start = [], 0
    for question in questions:
        end = start + len(question.choices)
        places.append(int(np.argmax(scores[start:end])))
        start = end
    return places


def _scored(engine: Engine, prompts: Sequence[Prompt], top: int) -> Iterator[tuple[int, RequestOutput]]:
    """Each prompt's place and its scores, as they are done."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=top)
    places = {engine.add(prompt.tokens, params): index for index, prompt in enumerate(prompts)}
    while engine.num_unfinished:
        for delta in engine.step():
            if delta.output is not None:
                yield places[delta.output.request_id], delta.output


def summarize_task(task: Task, answers: Answers, original: Answers | None = None) -> TaskScore:
    """Shares with intervals over questions, each by itself; the change is paired."""
    ones = np.ones(len(task.questions))

    def share(hits: Float64) -> Measurement:
        return share_interval(hits, ones, "share", related=False)

    right = np.array(answers.right, np.float64)
    score = TaskScore(task.kind, len(ones), task.chance, accuracy=share(right))
    if original is None:
        return score
    before = np.array(original.right, np.float64)
    changed = np.array([one != other for one, other in zip(answers.chosen, original.chosen, strict=True)], np.float64)
    broken, mended = before * (1 - right), (1 - before) * right
    flips = share(broken + mended)
    change = ratio_interval(right - before, ones, "share", related=False)
    if flips.median == 0:  # none was seen: as many as chance may have hidden could go either way
        change = replace(change, low=-flips.high, high=flips.high)
    return replace(
        score,
        original=share(before),
        change=change,
        changed=share(changed),
        flips=flips,
        broken=share(broken),
        mended=share(mended),
    )
