"""The sections of the page that are tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.study.markdown import table
from bench.study.measure import CHAIN_RULES, GAMMAS, PAPER_DRAFTS, TASK_NAMES, TREE_RULES
from bench.study.rows import find, listed, only, span, tau

MADE = {
    "base": "pre-trained on plain text, without the chat format",
    "chat": "*base*, tuned on dialogues",
    "ft": "*chat*, tuned on the target's own answers",
    "image": "*ft* with an adapter to the target's vision features, tuned on the target's answers with their pictures",
    "twin": "*ft*, tuned further on the answers of *image*, without pictures",
}
RULE_NAMES = {
    "token_level": "token-level",
    "block": "block",
    "recursive_rejection": "recursive rejection",
    "traversal": "traversal",
}
TREE_SHAPE = "tree 3,2,1"


def drafts(record: dict[str, Any]) -> str:
    """How the drafts were made."""
    made = record["header"]["image_training"]
    device = made["device"].replace("1 threads", "one thread")
    own = record["drafts"]["ft"]["parameters"]
    body = [
        (name, how, "36 tokens of it", f"{own + made['adapter']:,}")
        if name == "image"
        else (name, how, "no", f"{own:,}")
        for name, how in MADE.items()
    ]
    return f"""
## The drafts

{table(["draft", "how it was made", "sees the picture", "parameters, vision tower apart"], body, 3)}

*image* and *twin* learned from the same {made["answers"]:,} answers of the target, on {device}: the
adapter alone for {made["adapter_steps"]:,} steps, then adapter and language model for {made["steps"]:,}; the
twin for {made["twin_steps"]:,}. What *image* has over *twin* is the picture's; what it has over *ft* is further
training too. The adapter gets means over 2 x 2 of the target's 144 vision features, which are computed once for
both.
"""


def greedy(record: dict[str, Any]) -> str:
    """Block efficiency, MBSU and token rate at temperature 0."""
    shapes = {f"chain {gamma}": f"γ = {gamma}" for gamma in GAMMAS} | {TREE_SHAPE: "tree of 16"}
    head = ["draft", *(cell for name in shapes.values() for cell in (f"τ, {name}", "MBSU", "rate"))]
    parts = []
    for task in TASK_NAMES:
        body = []
        for draft in PAPER_DRAFTS:
            rows = [only(record, part="greedy", task=task, draft=draft, shape=shape) for shape in shapes]
            cells = [(tau(row), f"{row['mbsu']:.2f}", f"{row['ratio']:.2f}") for row in rows]
            body.append([draft, *(cell for three in cells for cell in three)])
        parts.append(f"**{task.capitalize()}**\n\n{table(head, body)}")
    compared = [row for row in record["rows"] if row.get("identical") is not None and row["draft"]]
    same = sum(row["identical"] for row in compared)
    plain, ft, image = (
        span([row["ttft"] * 1e3 for row in find(record, part="greedy", draft=draft)])
        for draft in (None, "ft", "image")
    )
    return f"""
## Greedy decoding

τ is the block efficiency, tokens per target pass. MBSU = τ / (c γ + 1), with c the bytes of a draft pass over
those of a target pass. The rate is that of tokens beside plain decoding. The tree has 3, 2 and 1 children per
node by depth, which are 16 nodes with its root. In {same} of the {len(compared)} greedy combinations of this
page every text is that of plain decoding, token for token.

{(chr(10) * 2).join(parts)}

Time to the first token, median: {plain} ms plain, {ft} ms with *ft*, {image} ms with *image*.
"""


def sampled(record: dict[str, Any]) -> str:
    """Block efficiency by rule at temperature 1."""
    ways = [("chains", f"chain {gamma}", f"γ = {gamma}", rule) for gamma in GAMMAS for rule in CHAIN_RULES]
    ways += [("trees", TREE_SHAPE, "tree of 16", rule) for rule in TREE_RULES]
    head = ["draft", *(f"{name}, {RULE_NAMES[rule]}" for _, _, name, rule in ways)]
    parts, gains = [], {"chains": [], "trees": []}
    for task in TASK_NAMES:
        body = []
        for draft in PAPER_DRAFTS:
            rows = [
                only(record, part=part, task=task, draft=draft, shape=shape, rule=rule)
                for part, shape, _, rule in ways
            ]
            body.append([draft, *map(tau, rows)])
            for one, other in zip(rows[::2], rows[1::2], strict=True):
                gains[one["part"]].append(other["tau"] / one["tau"] - 1)
        parts.append(f"**{task.capitalize()}**\n\n{table(head, body)}")
    chain, tree = (sum(values) / len(values) for values in gains.values())
    return f"""
## Sampling at temperature 1

Block efficiency by verification rule. Block verification judges a chain as a whole, traversal a tree; each
accepts at least as much in expectation as the rule before it. On average over drafts and tasks they give
{chain:+.1%} on chains and {tree:+.1%} on the tree here; single cells vary by more than that, as their intervals
say.

{(chr(10) * 2).join(parts)}
"""


def further(record: dict[str, Any]) -> str:
    """Later turns, and two pictures."""
    body = [
        [
            name,
            *(
                tau(
                    only(
                        record,
                        part=part,
                        task=task,
                        draft=draft,
                        shape=f"chain {GAMMAS[-1]}",
                        temperature=0.0,
                    )
                )
                for draft in PAPER_DRAFTS
            ),
        ]
        for part, task, name in (
            ("greedy", "conversation", "conversation, first question"),
            ("further", "follow-up", "conversation, last question after the others"),
            ("greedy", "caption", "caption of one picture"),
            ("further", "two-pictures", "caption of two pictures"),
        )
    ]
    return f"""
## Later turns and two pictures

Block efficiency, greedy, γ = {GAMMAS[-1]}. Later questions come with the earlier ones and their answers. With
two pictures the question is that of a caption; the miniature was trained on one picture at a time, so its
answers are no good descriptions, but they are the target's, token for token.

{table(["prompts", *PAPER_DRAFTS], body)}
"""


def compact(record: dict[str, Any]) -> str:
    """Reduced vocabularies and int8 weights."""
    facts = record["header"]["compact"]
    names = list(dict.fromkeys(row["draft"] for row in find(record, part="compact") if row["draft"]))
    means = {
        (name, heat, measure): sum(row[measure] for row in rows) / len(rows)
        for name in names
        for heat in (0.0, 1.0)
        for rows in [find(record, part="compact", draft=name, temperature=heat)]
        for measure in ("tau", "mbsu", "ratio", "cost")
    }
    body = [
        [
            name,
            f"{facts[name]['held_out_coverage']:.1%}" if name in facts else "all",
            f"{means[name, 0.0, 'cost']:.1%}",
            *(f"{means[name, heat, one]:.2f}" for heat in (0.0, 1.0) for one in ("tau", "mbsu", "ratio")),
        ]
        for name in names
    ]
    reduced = [name for name in names if name != "ft" and "int8" not in name]
    bound, rate = (
        [name for name in reduced if means[name, 0.0, measure] > means["ft", 0.0, measure]]
        for measure in ("mbsu", "ratio")
    )
    change = means["ft-int8", 0.0, "tau"] / means["ft", 0.0, "tau"] - 1
    rows = [row for row in find(record, part="compact") if row["draft"] and row["tau_interval"]]
    # A mean of three tasks varies less than each of them.
    half = (
        sum(high - low for low, high in (row["tau_interval"] for row in rows))
        / max(1, 2 * len(rows))
        / 3**0.5
    )
    prompts = find(record, part="compact")[0]["prompts"]
    large = [
        (row["name"], f"{row['megabytes_per_pass']:.0f} MB", f"{row['share_of_full']:.2f}")
        for row in record["header"]["compact_115m"]
    ]
    return f"""
## Compact drafts

Copies of *ft* by `fastspec shrink-draft`: with an output projection for the tokens alone that are most frequent
in answers of the target, and with int8 weights. Means over the three tasks, γ = {GAMMAS[-1]}, {prompts} prompts
each. The texts stay the target's, whatever a draft lacks.

{table(["draft", "of all tokens", "c", "τ, greedy", "MBSU", "rate", "τ, T = 1", "MBSU", "rate"], body)}

{_pays(bound, "greedy MBSU")} {_pays(rate, "greedy token rate")} The 95 % interval of a mean is about ± {half:.2f} in τ.
Rounding to int8 changes the greedy τ by {change:+.1%}. It pays in bytes on disk alone here: PyTorch multiplies int8
weights on a CPU in bfloat16 only, and the miniature runs in float32, so they are dequantised when loaded.

At the paper's size, 115 M parameters and 32,064 tokens, in bfloat16 (random weights, one thread of the same
machine): what a pass reads, and the time of a draft's share of a cycle with γ = {GAMMAS[-1]}, that of the whole
draft being 1.

{table(["draft of 115 M", "read per pass", "time"], large)}
"""


def _pays(names: Sequence[str], measure: str) -> str:
    """Which smaller vocabularies raise a measure, as a sentence."""
    if not names:
        return f"No smaller vocabulary raises the {measure}."
    return f"{listed(names)} {'raises' if len(names) == 1 else 'raise'} the {measure}."
