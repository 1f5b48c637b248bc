"""docs/study.md, written from the record alone: ``python -m bench.study.page`` renews it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.study.claims import claims, rejected
from bench.study.markdown import wrap
from bench.study.measure import GAMMAS
from bench.study.rows import only
from bench.study.sections import compact, drafts, further, greedy, sampled

DOCS = Path(__file__).parents[2] / "docs"
RECORD, PAGE, BARS = "study.json", "study.md", "study.svg"


def write_page(record: dict[str, Any]) -> str:
    """The page, as Markdown."""
    sections = (_opening, drafts, greedy, sampled, claims, rejected, further, compact, _limits, _again)
    return wrap("\n\n".join(section(record).strip("\n") for section in sections))


def read_record(folder: Path = DOCS) -> dict[str, Any]:
    """The record in a folder."""
    return json.loads((folder / RECORD).read_text("utf-8"))


def _opening(record: dict[str, Any]) -> str:
    header = record["header"]
    return f"""
# The paper's study, repeated in miniature

Gagrani et al. ([2404.08856](https://arxiv.org/abs/2404.08856)) decode LLaVA-7B speculatively with drafts of 115
M parameters. This page repeats their comparison with the models that come with fastspec: a LLaVA of 7.9 M
parameters that describes drawn scenes, and drafts of 0.17 M. The method is the same; the models are tiny and
the pictures simple. What that is worth for a 7B is said [below](#how-far-a-miniature-speaks-for-7b).

![Block efficiency, memory-bound speed-up and token rate of four drafts on three tasks]({BARS})

Greedy decoding with chains of {GAMMAS[0]} and {GAMMAS[1]} drafted tokens, {header["prompts"]} held-out prompts
per task, 95 % bootstrap intervals over prompts. Token rates are those of one thread of {header["device"]} in
float32, after the first token, relative to plain decoding. Every figure on this page is of one run, on record
in [{RECORD}]({RECORD}).
"""


def _limits(record: dict[str, Any]) -> str:
    cost = only(record, part="greedy", task="caption", draft="ft", shape=f"chain {GAMMAS[-1]}")["cost"]
    return f"""
## How far a miniature speaks for 7B

- **Exactness carries over.** Rules, trees and code are those that decode a 7B; that greedy texts are identical
does not depend on size.
- **Orders carry over with care.** That tuning pays as far as said above, that block verification accepts at least
as much in expectation, and that a draft without eyes fails where the picture decides, are matters of method.
- **Sizes do not.** The scenes' language has some 300 words, so 0.17 M parameters foresee more of it than 115 M
do of natural text. Pictures decide more of every sentence than in a chat about photographs, which favours the
adapter.
- **MBSU is arithmetic, the token rate is this machine's.** Here a draft pass reads {cost:.1%} of the bytes of a
target pass, in the paper 1.6 %. On a CPU so small models pay for operations rather than for bytes, and the
measured rate stays below MBSU.
"""


def _again(record: dict[str, Any]) -> str:
    header = record["header"]
    packages = header["packages"]
    return f"""
## Again

```
python -m bench.study --out DIR --prompts {header["prompts"]} --publish
```

This trains what is missing, goes on where it was interrupted, and writes the record, this page and its figures,
without `--publish` into DIR alone. Seeds are fixed: on the same versions and kind of machine texts and counts
come out the same, times do not. This run: fastspec {header["fastspec"]}, torch {packages["torch"]}, transformers
{packages["transformers"]}, Python {header["python"]}; {header["minutes"]} minutes of decoding; target weights
{header["target"]}.
"""


if __name__ == "__main__":
    (DOCS / PAGE).write_text(write_page(read_record()), "utf-8")
    print(f"written: {DOCS / PAGE}")
