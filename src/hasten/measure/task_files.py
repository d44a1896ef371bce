"""Questions of a task, read from a plain file, one JSON object a line. Knows no model.

    {"prompt": "The sky is", "choices": ["blue", "a fish"], "answer": 0}      one of several
    {"prompt": "Once upon a", "answer": "time"}                               what is written next
    {"text": "Once upon a time"}                                              the last word of a text, as LAMBADA has it
    {"goal": "...", "sol1": "...", "sol2": "..."}                             PIQA; answers in NAME-labels.lst beside it

A space is put between the prompt and what follows, unless the prompt ends in white space already.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.errors import HastenError

FORMATS = "prompt, choices and answer; prompt and answer; text; or goal, sol1 and sol2"
_MIN_QUESTIONS = 4  # below this an interval says nothing


@dataclass(frozen=True, slots=True)
class Question:
    """choices: what may follow the prompt, white space between the two included; one where it is to be written.
    answer: the place of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Task:
    """kind: "choice" or "word". shots: solved questions that are shown first, and not asked."""

    kind: str
    questions: tuple[Question, ...]
    shots: tuple[Question, ...] = ()

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        if self.kind == "word":
            return 0.0
        return sum(1 / len(question.choices) for question in self.questions) / len(self.questions)


def read_task(path: str | Path, most: int | None = None, num_shots: int = 0) -> Task:
    """The task in a file: its first num_shots questions as examples, of the others `most` at most, evenly spread.

    Raises HastenError with the line where something is not as it should be.
    """
    path = Path(path)
    rows = _rows(path)
    labels = _labels(path, len(rows)) if "goal" in rows[0] else None
    questions = [
        _question(row, None if labels is None else labels[index], f"{path} line {index + 1}")
        for index, row in enumerate(rows)
    ]
    kinds = {"word" if len(question.choices) == 1 else "choice" for question in questions}
    if len(kinds) > 1:
        raise HastenError(f"{path} holds questions with choices and without: put them into two files")
    asked = questions[num_shots:]
    if len(asked) < _MIN_QUESTIONS:
        raise HastenError(
            f"{path} has {len(questions)} questions, {num_shots} of them examples: "
            f"at least {_MIN_QUESTIONS} more are needed"
        )
    if most is not None and len(asked) > most:
        asked = [asked[index * len(asked) // most] for index in range(most)]
    return Task(kinds.pop(), tuple(asked), tuple(questions[:num_shots]))


def _rows(path: Path) -> list[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise HastenError(f"cannot read task {path}: {reason}") from None
    if not text.strip():
        raise HastenError(f"task {path} is empty: expected a question a line, with {FORMATS}")
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.rstrip().split("\n"), 1):  # splitlines() also splits within strings
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise HastenError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise HastenError(f"{path} line {number} is no question: expected an object with {FORMATS}")
        rows.append(row)
    return rows


def _labels(path: Path, count: int) -> list[int]:
    """PIQA's answers, one a line: valid.jsonl has them in valid-labels.lst."""
    file = path.with_name(f"{path.stem}-labels.lst")
    try:
        labels = [int(word) for word in file.read_text(encoding="utf-8").split()]
    except (OSError, ValueError):
        raise HastenError(f"{path} needs its answers in {file}, one number a line") from None
    if len(labels) != count:
        raise HastenError(f"{path} has {count} questions and {file} {len(labels)} answers: expected as many")
    return labels


def _question(row: Mapping[str, Any], label: int | None, where: str) -> Question:
    strings = {key: value for key, value in row.items() if isinstance(value, str)}
    if label is not None and {"goal", "sol1", "sol2"} <= strings.keys():
        return _choice(row["goal"], [row["sol1"], row["sol2"]], label, where)
    if "prompt" in strings and "choices" in row:
        return _choice(row["prompt"], row["choices"], row.get("answer"), where)
    if {"prompt", "answer"} <= strings.keys():
        return Question(row["prompt"], (_joined(row["prompt"], row["answer"], where),), 0)
    if "text" in strings:
        prompt, space, word = row["text"].rstrip().rpartition(" ")
        if not prompt or not word:
            raise HastenError(f"{where}: the text has one word, expected some before the last")
        return Question(prompt, (space + word,), 0)
    raise HastenError(f"{where} has {', '.join(map(str, row)) or 'nothing'}: expected {FORMATS}")


def _choice(prompt: str, choices: object, answer: object, where: str) -> Question:
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise HastenError(f"{where}: choices is {choices!r:.80}, expected a list of two strings or more")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise HastenError(f"{where}: answer is {answer!r:.80}, expected the place of the right choice, from 0 on")
    return Question(prompt, tuple(_joined(prompt, choice, where) for choice in choices), answer)


def _joined(prompt: str, choice: str, where: str) -> str:
    if not choice.strip():
        raise HastenError(f"{where}: an answer is empty")
    return choice.strip() if not prompt or prompt[-1].isspace() else " " + choice.strip()


def shown(shots: Sequence[Question]) -> str:
    """Solved questions as a model reads them before the one that is asked."""
    return "".join(f"{shot.prompt}{shot.choices[shot.answer]}\n\n" for shot in shots)
