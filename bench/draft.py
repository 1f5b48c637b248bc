"""How long does a pass of the draft take, beside transformers in a graph and cuBLAS?"""

from __future__ import annotations

from bench.passes import measure_pass
from bench.setup import Setup
from fastspec.model.transformer import DecodeTransformer
from fastspec.model.vision import text_stack

#: One token, and as many as a cycle with a chain of five catches up with.
ROWS = (1, 6)


def measure(setup: Setup) -> list[dict]:
    """Rows ``draft/<draft>/rows<R>`` and those of its phases, ``draft/<draft>/rows<R>/<phase>``.

    The context is the text of the target's, for the draft sees no image.
    """
    stack = text_stack(setup.draft_model(agreement=0.8))
    transformer = DecodeTransformer(*stack)
    context = setup.context - setup.config.image_seq_length
    return [
        row
        for rows in ROWS
        for row in measure_pass(
            setup, f"draft/{setup.draft}/rows{rows}", transformer, stack, rows, context, "us", repeats=10
        )
    ]
