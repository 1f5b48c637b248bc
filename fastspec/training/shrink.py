"""What ``fastspec shrink-draft`` does: a compact copy of a draft, its vocabulary chosen from the target's answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaForCausalLM

from fastspec.command import load_draft
from fastspec.draft.compact import CompactLlamaForCausalLM
from fastspec.lines import BadLines, DataError, read_lines
from fastspec.miniature.models import check_replaceable, replace_folder
from fastspec.training.chats import parse_chat

#: Of a compact draft's folder: how it was made.
FACTS = "shrinking.json"
WEIGHTS = {"int8": 8, "full": 16}


@dataclass(frozen=True)
class Shrinking:
    """Everything that ``fastspec shrink-draft`` asks for.

    Attributes:
        draft: a text-only LLaMA draft, or ``miniature``.
        out: the folder of its compact copy.
        answers: files of ``fastspec distill-data``, whose tokens are counted.
        vocabulary: how many tokens the copy can propose; all of them if None.
        weights: ``int8``, or ``full`` to leave them as they are.
    """

    draft: str
    out: Path
    answers: tuple[Path, ...] = ()
    vocabulary: int | None = None
    weights: str = "full"
    skip_bad_lines: bool = False


def shrink(asked: Shrinking) -> dict[str, Any]:
    """Writes the compact draft; returns counts, ready for JSON.

    Raises:
        TypeError: for a draft that is no text-only LLaMA.
        ValueError: for arguments, files or a checkpoint that cannot be used.
    """
    if asked.weights not in WEIGHTS:
        raise ValueError(f"weights must be {' or '.join(WEIGHTS)}, got {asked.weights!r}")
    if asked.vocabulary is None and asked.weights == "full":
        raise ValueError("nothing to shrink: pass --vocabulary, --weights int8, or both")
    if (asked.vocabulary is None) != (not asked.answers):
        raise ValueError(
            "--vocabulary and --answers belong together: the answers' most frequent tokens are kept"
        )
    check_replaceable(asked.out, FACTS)
    bad = BadLines(asked.skip_bad_lines)
    draft, tokenizer = _load(asked)
    size = draft.config.vocab_size
    kept, coverage = torch.arange(size), 1.0
    if asked.vocabulary is not None:
        counts = count_tokens(asked.answers, size, bad)
        ids = most_frequent(counts, asked.vocabulary, size, _end_tokens(draft))
        coverage = sum(counts[token] for token in ids) / counts.total()
        kept = torch.tensor(ids)
    compact = CompactLlamaForCausalLM.of(draft, kept, WEIGHTS[asked.weights])
    result = {
        "out": str(asked.out),
        "vocabulary": len(kept),
        "of": size,
        "coverage": coverage,
        "weights": asked.weights,
        "skipped": len(bad),
        "note": bad.summary(),
    }

    def fill(folder: Path) -> None:
        compact.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        facts = {"arguments": asdict(asked), "result": result}
        (folder / FACTS).write_text(json.dumps(facts, indent=1, default=str) + "\n")

    asked.out.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(asked.out, fill)
    return result


def count_tokens(paths: Iterable[Path], vocab_size: int, bad: BadLines) -> Counter[int]:
    """How often each token occurs in the answers.

    Raises:
        ValueError: for a file that is missing, empty or without an answer.
        DataError: for a line that is no answer of ``fastspec distill-data``, or of a larger vocabulary.
    """
    counts: Counter[int] = Counter()
    for path in paths:
        before = counts.total()
        for line in read_lines(path, bad):
            try:
                token_ids = parse_chat(line).turns[-1].token_ids
                if token_ids is None:
                    raise line.error("the answer has no 'token_ids'; fastspec distill-data writes them")
                if max(token_ids) >= vocab_size:
                    raise line.error(
                        f"token id {max(token_ids)} is outside the draft's vocabulary of {vocab_size}"
                    )
            except DataError as error:
                bad.report(error)
                continue
            counts.update(token_ids)
        if counts.total() == before:
            raise ValueError(f"{path} has no answer" + (f"; {bad.summary()}" if bad else ""))
    return counts


def most_frequent(counts: Counter[int], size: int, vocab_size: int, always: Sequence[int]) -> list[int]:
    """The ids to keep, ascending: those of ``always``, then the most frequent, the lowest first among equals.

    Raises:
        ValueError: for a size below 1 + ``len(always)`` or above the vocabulary.
    """
    if not len(always) < size <= vocab_size:
        raise ValueError(
            f"--vocabulary must be {len(always) + 1} to {vocab_size}, the draft's vocabulary, got {size}"
        )
    others = sorted(set(range(vocab_size)) - set(always), key=lambda token: (-counts[token], token))
    return sorted([*always, *others[: size - len(always)]])


def _load(asked: Shrinking) -> tuple[LlamaForCausalLM, Any]:
    if asked.draft == "ngram":
        raise TypeError("draft 'ngram' has no weights that could shrink")
    draft, tokenizer = load_draft(SimpleNamespace(draft=asked.draft, dtype="auto", device="cpu"))
    if type(draft) is not LlamaForCausalLM:
        raise TypeError(f"only a text-only LLaMA draft can shrink, got {type(draft).__name__}")
    return draft, tokenizer


def _end_tokens(draft: LlamaForCausalLM) -> list[int]:
    """Without its end token a draft would never propose to stop."""
    end = draft.generation_config.eos_token_id
    return [] if end is None else sorted(set(end)) if isinstance(end, list) else [end]
