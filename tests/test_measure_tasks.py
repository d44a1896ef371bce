"""Tasks: how files are read and refused, how prompts are cut, and answers against log-probabilities summed by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.backends.reference import ReferenceBackend
from hasten.errors import HastenError
from hasten.measure.speed import make_engine
from hasten.measure.task_files import Question, Task, read_task, shown
from hasten.measure.tasks import Answers, answer, make_prompts, summarize_task
from hasten.model.checkpoint import open_checkpoint
from hasten.recipe import Run


def by_byte(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CHOICES = [{"prompt": f"{n} is", "choices": ["even", " odd "], "answer": n % 2} for n in range(8)]


def test_choices_are_read_with_a_space_before_each(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "parity.jsonl", CHOICES), most=3, num_shots=2)
    assert task.kind == "choice"
    assert [question.prompt for question in task.questions] == ["2 is", "4 is", "6 is"]
    assert task.questions[0] == Question("2 is", (" even", " odd"), 0)
    assert task.chance == 0.5
    assert shown(task.shots) == "0 is even\n\n1 is odd\n\n"


def test_last_words_and_written_answers(tmp_path: Path) -> None:
    texts = read_task(write(tmp_path / "words.jsonl", [{"text": f"one two {n}"} for n in range(5)]))
    assert texts.kind == "word"
    assert texts.chance == 0
    assert texts.questions[4] == Question("one two", (" 4",), 0)
    rows = [{"prompt": f"{n} and one make ", "answer": str(n + 1)} for n in range(4)]
    assert read_task(write(tmp_path / "sums.jsonl", rows)).questions[1] == Question("1 and one make ", ("2",), 0)


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"one\u2028two\x85 {n}"}, ensure_ascii=False) for n in range(4)]
    (tmp_path / "task.jsonl").write_bytes(("\r\n".join(lines) + "\r\n\n").encode())
    assert read_task(tmp_path / "task.jsonl").questions[3] == Question("one\u2028two\x85", (" 3",), 0)


def test_piqa_has_its_answers_beside_it(tmp_path: Path) -> None:
    rows = [{"goal": "boil", "sol1": "heat it", "sol2": "cool it"}] * 4
    path = write(tmp_path / "valid.jsonl", rows)
    with pytest.raises(HastenError, match=r"needs its answers in .*valid-labels\.lst"):
        read_task(path)
    (tmp_path / "valid-labels.lst").write_text("0\n1\n0\n")
    with pytest.raises(HastenError, match=r"4 questions and .* 3 answers"):
        read_task(path)
    (tmp_path / "valid-labels.lst").write_text("0\n1\n0\n1\n")
    assert [question.answer for question in read_task(path).questions] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("{\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is no question"),
        ('{"question": "a"}\n', "line 1 has question: expected prompt, choices and answer"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}\n', "expected a list of two strings or more"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}\n', "answer is 2, expected the place"),
        ('{"prompt": "a", "choices": ["b", "c"]}\n', "answer is None"),
        ('{"prompt": "a", "choices": ["b", " "], "answer": 0}\n', "an answer is empty"),
        ('{"text": "word"}\n', "the text has one word"),
        ('{"text": "a b"}\n', "has 1 questions, 0 of them examples: at least 4 more"),
        ('{"text": "a b"}\n{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n', "with choices and without"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(text)
    with pytest.raises(HastenError, match=complaint):
        read_task(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(HastenError, match=r"cannot read task .*nowhere\.jsonl: No such file"):
        read_task(tmp_path / "nowhere.jsonl")


def test_prompts_know_where_the_answer_begins_and_keep_the_end() -> None:
    task = Task("choice", (Question("ab", (" c", " de"), 1),), shots=(Question("x", (" y", " z"), 1),))
    ((first, second),) = make_prompts(task, by_byte, 1, 100)
    assert list(first.tokens) == [1, *by_byte("x z\n\nab c")]
    assert list(second.tokens[second.start :]) == by_byte(" de")
    assert second.num_bytes == 2
    ((_, short),) = make_prompts(task, by_byte, 1, 5)
    assert list(short.tokens) == [1, *by_byte("b de")]
    assert list(short.tokens[short.start :]) == by_byte(" de")


def test_a_prompt_whose_last_token_grows_begins_where_the_two_part() -> None:
    """Merging across the border: "ab" + "c" is one token of its own."""

    def merged(text: str) -> list[int]:
        return [99 if part == "abc" else 7 for part in text.split("_")]

    task = Task("word", (Question("x_ab", ("c",), 0),))
    (((prompt),),) = make_prompts(task, merged, None, 10)
    assert prompt.tokens[prompt.start :] == (99,)


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    checkpoint = open_checkpoint(tiny_model("llama"))
    backend = ReferenceBackend()
    backend.load(checkpoint.spec, checkpoint.weights())
    return checkpoint.spec, backend


def log_probabilities(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """[T - 1, V], one token after the other through the engine's own interface for scoring."""
    from hasten.engine.request import SamplingParams

    spec, backend = model
    engine = make_engine(spec, backend, Run(kv_cache="fp32"), 1, len(tokens))
    engine.add(tokens, SamplingParams(max_tokens=0, prompt_logprobs=spec.vocab_size))
    out = np.full((len(tokens), spec.vocab_size), -np.inf)
    while engine.num_unfinished:
        for delta in engine.step():
            if delta.output is not None:
                for row, entry in enumerate(delta.output.prompt_logprobs[1:]):
                    for token, value in entry.top:
                        out[row, token] = value
    return out[:-1]


def test_choices_are_those_of_log_probabilities_summed_by_hand(model: Any) -> None:
    spec, backend = model
    questions = tuple(Question(f"{n} times", (" a", " bcd", " efghi"), n % 3) for n in range(6))
    task = Task("choice", questions)
    prompts = make_prompts(task, by_byte, 1, spec.max_position)
    longest = max(len(prompt.tokens) for choices in prompts for prompt in choices)
    found = answer(make_engine(spec, backend, Run(kv_cache="fp32"), 4, longest), task, prompts)
    for place, choices in zip(found.chosen, prompts, strict=True):
        scores = []
        for prompt in choices:
            table = log_probabilities(model, prompt.tokens)
            rows = range(prompt.start - 1, len(prompt.tokens) - 1)
            scores.append(sum(table[row, prompt.tokens[row + 1]] for row in rows) / prompt.num_bytes)
        assert place == int(np.argmax(scores))
    assert found.right == tuple(
        place == question.answer for place, question in zip(found.chosen, questions, strict=True)
    )


def test_a_written_word_is_right_where_every_token_is_the_likeliest(model: Any) -> None:
    spec, backend = model
    start = by_byte("Once")
    likeliest = log_probabilities(model, [1, *start, 5])[len(start)].argmax()
    task = Task("word", (Question("Once", (" x",), 0),) * 4)
    prompts = make_prompts(task, by_byte, 1, spec.max_position)
    known = [type(prompts[0][0])((1, *start, int(token)), 1 + len(start), 1) for token in (likeliest, likeliest + 1)]
    engine = make_engine(spec, backend, Run(kv_cache="fp32"), 4, 16)
    found = answer(engine, task, [[known[0]], [known[1]], [known[0]], [known[1]]])
    assert found.right == (True, False, True, False)
    assert found.chosen[0] == (int(likeliest),)


def test_flips_are_counted_both_ways() -> None:
    task = Task("choice", (Question("a", ("b", "c", "d"), 0),) * 10)
    before = Answers((0,) * 5 + (1,) * 5, (True,) * 5 + (False,) * 5)
    after = Answers((0, 0, 0, 1, 2, 0, 1, 1, 1, 2), (True,) * 3 + (False,) * 2 + (True,) + (False,) * 4)
    found = summarize_task(task, after, before)
    assert found.accuracy.median == 0.4
    assert found.chance == pytest.approx(1 / 3)
    medians = {}
    for key in ("original", "change", "changed", "flips", "broken", "mended"):
        value = getattr(found, key)
        medians[key] = value.median
        assert value.low <= value.median <= value.high
    assert medians == pytest.approx(
        {"original": 0.5, "change": -0.1, "changed": 0.4, "flips": 0.3, "broken": 0.2, "mended": 0.1}
    )


def test_questions_count_each_by_itself() -> None:
    task = Task("choice", (Question("a", ("b", "c"), 0),) * 40)
    right = (True, False) * 20  # neighbours that balance each other are no sign of certainty
    found = summarize_task(task, Answers(tuple(int(not one) for one in right), right))
    assert found.accuracy.low == pytest.approx(0.5 - 2.023 * (0.25 / 39) ** 0.5, abs=1e-3)
    assert found.accuracy.n == 40
    same = summarize_task(task, Answers((0,) * 40, right), Answers((0,) * 40, right))
    assert same.change is not None
    assert same.flips is not None
    assert (same.change.median, same.change.low, same.change.high) == (0, -same.flips.high, same.flips.high)
    assert 0 < same.flips.high < 0.1
