"""Whether a teacher can teach a student at all: both must mean the same by a token. Reads tokenizers, no weight."""

from pathlib import Path

from hasten.errors import RecipeError
from hasten.model.checkpoint import open_checkpoint
from hasten.model.tokenizer import Tokenizer


def check_teacher(teacher: Path, student: Path) -> int:
    """How many tokens both know. RecipeError where their tokens differ: next-token probabilities would not be of the
    same things."""
    one, other = Tokenizer(teacher), Tokenizer(student)
    if one.vocab_size != other.vocab_size:
        raise _different(teacher, f"{one.vocab_size} tokens, the student's {other.vocab_size}")
    for index in range(one.vocab_size):
        if one.id_to_token(index) != other.id_to_token(index):
            raise _different(
                teacher,
                f"{one.id_to_token(index)!r} as token {index}, the student's {other.id_to_token(index)!r}",
            )
    return min(open_checkpoint(folder).spec.vocab_size for folder in (teacher, student))


def _different(teacher: Path, what: str) -> RecipeError:
    return RecipeError(
        f"the vocabulary of the teacher {teacher} has {what}: they must be the same, take a teacher with the "
        "student's tokenizer"
    )
