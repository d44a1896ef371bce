"""Fourteen public-domain books -> clean paragraphs, split into training, validation and held-out text.

Knows the files' quirks (line wraps, headings, footnotes, indices), not tokens. Expects a folder with classic-books/ and
tinyshakespeare/; SOURCE.md of the bundled model says where they come from.

The split: of each book, the held-out passage starts 70 % of the way in and holds 0.9 % of its text, the validation
passage starts at 35 % and holds 2 %; both are whole paragraphs in a row. A gap of at least 2,000 bytes around each is
thrown away, and so is every training paragraph that shares 13 words in a row with one of them, since the authors quote
themselves.
"""

import argparse
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

# title, file, first words of the text, first words of what follows it (None: the end of the file)
BRONTE, DARWIN, DU_BOIS = (f"classic-books/{name}.txt" for name in ("bronte", "darwin", "dubois"))
SHAKESPEARE = "tinyshakespeare/input.txt"
BOOKS = [
    ("Jane Eyre", BRONTE, "There was no possibility of taking a walk", "SHIRLEY.\n\nCHAPTER I."),
    ("Shirley", BRONTE, "Of late years an abundant shower of curates", "THE PROFESSOR\n\nCHAPTER I."),
    ("The Professor", BRONTE, "THE other day, in looking over my papers", "\nVillette\n"),
    ("Villette", BRONTE, "\nVillette\n", None),
    ("On the Origin of Species", DARWIN, "When on board H.M.S. 'Beagle,'", "\nINDEX.\n\n"),
    ("The Expression of the Emotions", DARWIN, "MANY works have been written on", "\nFOOTNOTES:\n"),
    ("The Descent of Man", DARWIN, "The nature of the following work", "\nINDEX.\n\n"),
    ("Darkwater", DU_BOIS, "These are the things of which men think", "WILLIAM LEVI BULL"),
    ("The Negro in the South", DU_BOIS, "WILLIAM LEVI BULL", "THE QUEST OF THE SILVER FLEECE"),
    ("The Quest of the Silver Fleece", DU_BOIS, "He who would tell a tale", "Herein lie buried many things"),
    ("The Souls of Black Folk", DU_BOIS, "Herein lie buried many things", "THE SUPPRESSION OF THE\n"),
    ("The Suppression of the African Slave-Trade", DU_BOIS, "This monograph proposes", "\nAPPENDIX A."),
    ("The Negro", DU_BOIS, "The time has not yet come for a complete", "SUGGESTIONS FOR FURTHER READING"),
    ("Plays of Shakespeare", SHAKESPEARE, "First Citizen:", None),
]
HELDOUT_START, HELDOUT_SHARE = 0.70, 0.009
VALID_START, VALID_SHARE = 0.35, 0.020
GAP_BYTES = 2_000
OVERLAP_WORDS = 13

HEADING = re.compile(r"^(chapter\b.*|[ivxl]+\.?|[ivxl]+ [A-Z' ]+|\d+\.|[^a-z]+|_[^_]*_)$", re.IGNORECASE)
REPLACEMENTS = {"“": '"', "”": '"', "‘": "'", "’": "'", "_": "", "~": "", "\t": " "}


@dataclass(frozen=True)
class Split:
    """Passages; each is text with a blank line between its paragraphs."""

    train: list[str]
    valid: list[str]
    heldout: list[str]


def read_book(data: Path, file: str, start: str, end: str | None) -> str:
    """The text of one book between its two marks; raises ValueError where a mark is not found."""
    text = unicodedata.normalize("NFC", (data / file).read_text(encoding="utf-8").replace("\r\n", "\n"))
    begin = text.find(start)
    stop = len(text) if end is None else text.find(end, begin)
    if begin < 0 or stop < 0:
        raise ValueError(f"{file}: {start!r} .. {end!r} not found; is this the file that SOURCE.md names?")
    return text[begin:stop]


def is_heading(block: str) -> bool:
    lines = block.split("\n")
    letters = re.sub(r"[^A-Za-z]", "", block)
    return len(lines) == 1 and len(block) < 70 and (letters.isupper() or not letters or bool(HEADING.match(block)))


def is_prose(block: str) -> bool:
    """Neither indented (tables, footnotes, epigraphs), nor a list of short lines, a footnote, a caption or figures."""
    lines = block.split("\n")
    if block.startswith(("    ", "[", "*")) or sum(c.isdigit() for c in block) > 0.04 * len(block):
        return False
    return len(lines) == 1 or sum(map(len, lines[:-1])) >= 50 * (len(lines) - 1)


def clean(block: str) -> str:
    for old, new in REPLACEMENTS.items():
        block = block.replace(old, new)
    block = re.sub(r"\[(Footnote )?\d+\]|\[[A-Z]\]", "", block)
    return re.sub(r" +", " ", block).strip()


def paragraphs(text: str, verse: bool) -> list[str]:
    """Paragraphs in order, line wraps undone unless verse; "" marks where a heading stood."""
    result: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        block = block.strip("\n").rstrip()
        if verse:
            result.append(clean(block))
        elif is_heading(block.strip()):
            result.append("")
        elif is_prose(block):
            result.append(clean(block.replace("\n", " ")))
    return result


def take(blocks: list[str], start: float, share: float) -> tuple[range, range]:
    """Paragraph numbers of a passage that starts at `start` of the text and holds `share` of it; and with the gaps."""
    ends = [0]
    for block in blocks:
        ends.append(ends[-1] + len(block.encode()) + 2)
    first = next(i for i, at in enumerate(ends) if at >= start * ends[-1])
    last = next(i for i, at in enumerate(ends) if at >= ends[first] + share * ends[-1])
    before = max(i for i, at in enumerate(ends) if at <= ends[first] - GAP_BYTES)
    after = min(i for i, at in enumerate(ends) if at >= ends[last] + GAP_BYTES)
    return range(first, last), range(before, after)


def passages(blocks: list[str]) -> list[str]:
    """The text between headings; scraps under 200 characters (epigraphs, lists of titles) are left out."""
    parts = (part.strip("\n") for part in re.split(r"\n{3,}", "\n\n".join(blocks)))
    return [part for part in parts if len(part) >= 200]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + OVERLAP_WORDS]) for i in range(len(words) - OVERLAP_WORDS + 1)}


def split_books(data: Path) -> Split:
    """All books, cleaned and split as the file's docstring says. Deterministic."""
    train: list[list[str]] = []
    valid: list[str] = []
    heldout: list[str] = []
    for _, file, start, end in BOOKS:
        blocks = paragraphs(read_book(data, file, start, end), verse=file == SHAKESPEARE)
        held, held_gap = take(blocks, HELDOUT_START, HELDOUT_SHARE)
        vali, vali_gap = take(blocks, VALID_START, VALID_SHARE)
        heldout.append("\n\n".join(blocks[i] for i in held if blocks[i]))
        valid.append("\n\n".join(blocks[i] for i in vali if blocks[i]))
        train += [blocks[: vali_gap.start], blocks[vali_gap.stop : held_gap.start], blocks[held_gap.stop :]]
    unseen = shingles("\n\n".join(valid + heldout))
    kept = [[b for b in blocks if not (b and unseen & shingles(b))] for blocks in train]
    return Split([p for blocks in kept for p in passages(blocks)], valid, heldout)


def main() -> None:
    parser = argparse.ArgumentParser(description="write the held-out text and print the sizes of the split")
    parser.add_argument("--data", type=Path, required=True, help="folder with classic-books/ and tinyshakespeare/")
    parser.add_argument("--heldout", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    split = split_books(args.data)
    args.heldout.write_text("\n\n".join(split.heldout), encoding="utf-8")
    for name in ("train", "valid", "heldout"):
        part = getattr(split, name)
        print(f"{name:8s} {len(part):5d} passages {sum(len(p.encode()) for p in part):10,d} bytes")


if __name__ == "__main__":
    main()
