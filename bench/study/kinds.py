"""What kind of word a token is part of, and where drafts were not followed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from fastspec.miniature import lexicon
from fastspec.miniature.scenes import COLOURS
from fastspec.runs import Run

#: Kinds whose words are seen in the picture, then the others.
VISUAL = ("shape", "colour", "size", "texture", "place", "number", "verdict")
OTHER = ("function word", "other word", "mark", "end")

_FUNCTION = {
    *("a", "an", "the", "this", "that", "these", "it", "its", "they", "them", "there", "i", "you", "we"),
    *("is", "are", "be", "can", "do", "have", "has", "not", "also", "both", "all", "only", "just"),
    *("of", "in", "on", "at", "to", "with", "by", "for", "from", "up", "out", "as", "than"),
    *("and", "or", "but", "so", "while", "what", "which", "where"),
}


def _words(*texts: Iterable[str]) -> set[str]:
    return {word for some in texts for text in some for word in re.findall(r"[a-z]+", text.lower())}


_SHAPES = _words(*lexicon.SHAPE_WORDS.values())
_KINDS = {
    "function word": _FUNCTION,
    "shape": _SHAPES | {lexicon.PLURALS.get(word, word + "s") for word in _SHAPES},
    "colour": _words(COLOURS, *lexicon.COLOUR_WORDS.values(), *lexicon.TONE_WORDS.values()) - {"coloured"},
    "size": _words(*lexicon.SIZE_WORDS.values(), ["bigger", "smaller"]),
    "texture": _words(*lexicon.TEXTURE_WORDS.values(), ["stripes", "dots", "checks"]),
    "place": _words(
        lexicon.SPOT_CELLS,
        *lexicon.RELATION_WORDS.values(),
        *lexicon.ROW_WORDS,
        *lexicon.COLUMN_WORDS,
        ["end", "halfway", "down", "hand"],
    ),
    "number": set(lexicon.NUMBERS),
    "verdict": {"yes", "no"},
}
_PIECES = re.compile(r"[A-Za-z]+|[^A-Za-z\s]")


def kinds_of(tokens: Sequence[str]) -> list[str]:
    """The kind of each token: that of the word or mark in which its first visible character stands.

    Args:
        tokens: as texts that make up the answer when joined; the end token is ``</s>``.
    """
    text = "".join("" if token == "</s>" else token for token in tokens)
    owner = {}
    for piece in _PIECES.finditer(text):
        kind = _kind(piece[0], text[piece.end() : piece.end() + 1], text[: piece.start()])
        owner.update(dict.fromkeys(range(*piece.span()), kind))
    kinds, place = [], 0
    for token in tokens:
        if token == "</s>":
            kinds.append("end")
            continue
        first = place + len(token) - len(token.lstrip())
        kinds.append(owner.get(first, "mark"))
        place += len(token)
    return kinds


def _kind(word: str, after: str, before: str) -> str:
    if not word.isalpha():
        return "number" if word.isdigit() else "mark"
    # An option's letter; an article begins a sentence and is followed by a space.
    if word in "ABCD" and (after in ("", ".", ")", ",") or before.endswith("(")):
        return "verdict"
    return next((kind for kind, words in _KINDS.items() if word.lower() in words), "other word")


def verdicts(run: Run) -> list[bool | None]:
    """For each token of an answer: whether the draft foresaw it; None where no drafted token was at stake.

    That is so for the first token, which the prefill gives, and for the token that the target adds to a chain that was
    accepted to its end.
    """
    gamma, accepted = len(run.branching), 0
    found: list[bool | None] = [None]
    for drafted in run.drafted[1:]:
        if drafted == "1":
            found.append(True)
            accepted += 1
            continue
        found.append(None if accepted == gamma else False)
        accepted = 0
    return found


def tally(runs: Iterable[Run], tokenizer: Any) -> dict[str, tuple[int, int]]:
    """By kind: how many tokens were not foreseen, of how many."""
    tested, missed = Counter(), Counter()
    for run in runs:
        for kind, foreseen in zip(kinds_of(pieces(run, tokenizer)), verdicts(run), strict=True):
            if foreseen is not None:
                tested[kind] += 1
                missed[kind] += not foreseen
    return {kind: (missed[kind], tested[kind]) for kind in (*VISUAL, *OTHER) if tested[kind]}


def pieces(run: Run, tokenizer: Any) -> list[str]:
    """The answer's tokens as texts that make it up when joined."""
    ids = list(run.token_ids)
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        if ids[end - 1] == tokenizer.eos_token_id:
            texts.append("</s>")
            continue
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        texts.append(text[len(before) :])
        before = text
    return texts
