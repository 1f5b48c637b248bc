"""The demo: the miniature LLaVA describes a picture, speculatively and plainly, side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastspec.decoder import Commitment, Request, SpeculativeDecoder
from fastspec.images import load_image
from fastspec.metrics import SpeculationRecord
from fastspec.sampling import SamplingParams

#: The miniature's best draft by docs/study.md.
DRAFT = "image"
DRAFTED = "bold green"
QUIET = "dim"
REPEATS = 3
SAVED_SIDE = 384
#: Room at the end of a line for what may follow a token without a space: the rest of its word, brackets.
WORD_ENDS = 12


@dataclass(frozen=True)
class Timed:
    """One generation: its tokens, its statistics and its wall-clock time in seconds."""

    tokens: list[int]
    record: SpeculationRecord
    seconds: float


def decode(decoder: SpeculativeDecoder, request: Request, listen: Callable[[Commitment], None]) -> Timed:
    """Decodes one request, calling ``listen`` with every commitment."""
    tokens, start = [], time.perf_counter()
    for commitment in decoder.stream([request]):
        tokens += commitment.tokens[0]
        listen(commitment)
    return Timed(tokens, decoder.record(1), time.perf_counter() - start)


class MarkedStream:
    """Prints text as it is committed; drafted and accepted tokens stand in [brackets] and in colour."""

    def __init__(self, console: Console, tokenizer):
        self._console, self._tokenizer = console, tokenizer
        self._tokens: list[int] = []
        self._shown = 0
        self._open = False
        self._column = 0

    def __call__(self, commitment: Commitment) -> None:
        for place, token in enumerate(commitment.tokens[0]):
            self._tokens.append(token)
            text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            piece = text[self._shown :]
            if not piece or piece.endswith("\ufffd"):
                continue  # an unfinished character
            self._shown = len(text)
            self._print(piece, drafted=place < commitment.num_drafted[0])

    def close(self) -> None:
        """Ends the line."""
        self._print("", drafted=False)
        self._console.print()

    def _print(self, piece: str, drafted: bool) -> None:
        word = piece.lstrip()
        space = piece[: len(piece) - len(word)]
        if self._column == 0:
            space = ""
        elif space and self._column + len(piece) + WORD_ENDS > self._console.width:
            space, self._column = "\n", 0
        line = Text()
        if self._open and not drafted:
            line.append("]", DRAFTED)
        line.append(space)
        if drafted and not self._open:
            line.append("[", DRAFTED)
        line.append(word, DRAFTED if drafted else "")
        self._open = drafted
        self._column += len(line)
        self._console.print(line, end="", soft_wrap=True)


def run_demo(
    image: Path | None,
    prompt: str | None,
    *,
    gamma: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    device: str,
    save: Path,
    console: Console,
) -> bool:
    """Draws or takes a picture, streams the answer, prints the table.

    Returns:
        Whether speculative and plain text are identical.
    """
    from fastspec import miniature
    from fastspec.draft.sharing import encode_shared, share_vision_tower
    from fastspec.model.vision import Prompt, image_token_id

    torch.set_num_threads(1)  # the miniature's matrices are so small that threads only wait for each other
    picture, question = None, prompt
    if image is not None:
        picture, question = load_image(image), prompt or "Describe the picture."
    processor = miniature.load_processor()
    target, draft = miniature.load_target(device=device), miniature.load_draft(DRAFT, device=device)
    if picture is None:
        example = miniature.sample_example("caption", seed)
        picture, question = example.scene.render(), prompt or example.turns[0][0]
        picture.resize((SAVED_SIDE, SAVED_SIDE)).save(save)

    inputs = miniature.prepare(processor, picture, question).to(device)
    share_vision_tower(target, draft)
    features = encode_shared(target, {"pixel_values": inputs["pixel_values"]}, look_back=False)
    request = Request(
        Prompt(inputs["input_ids"][0], image_token_id(target), features, inputs["pixel_values"]),
        max_new_tokens,
        SamplingParams(temperature=temperature),
        seed=seed,
        eos_token_ids=(processor.tokenizer.eos_token_id,),
    )
    capacity = min(
        request.prompt.num_tokens + max_new_tokens, target.config.text_config.max_position_embeddings
    )
    speculative = SpeculativeDecoder(target, draft, gamma=gamma, capacity=capacity)
    plain = SpeculativeDecoder(target, None, capacity=capacity)

    drawn = image is None
    origin = "drawn; --image takes one of yours" if drawn else "yours"
    console.print(
        Text.assemble(("picture   ", QUIET), f"{save if drawn else image} ({origin})"),
        soft_wrap=True,
    )
    console.print(Text.assemble(("question  ", QUIET), question), soft_wrap=True)
    console.print(
        Text.assemble(
            ("answer    ", QUIET),
            ("[drafted and accepted]", DRAFTED),
            " tokens in brackets, the target's own outside\n",
        ),
        soft_wrap=True,
    )
    stream = MarkedStream(console, processor.tokenizer)
    decode(speculative, request, stream)
    stream.close()

    # Timed without printing, and not the first time, which pays for lazy initialisation.
    decode(plain, request, _ignore)
    pairs = [(decode(speculative, request, _ignore), decode(plain, request, _ignore)) for _ in range(REPEATS)]
    fast, slow = (min(runs, key=lambda run: run.seconds) for runs in zip(*pairs, strict=True))
    identical = all(one.tokens == other.tokens for one, other in pairs)
    console.print()
    console.print(_table(fast, slow))
    cost = fast.record.cost_ratio
    console.print(
        "block efficiency: tokens per target pass, the prefill apart\n"
        f"MBSU: memory-bound speed-up; a draft pass reads {cost:.1%} of the bytes of a target pass\n",
        style=QUIET,
        soft_wrap=True,
    )
    if temperature == 0:
        verdict = "yes" if identical else "NO"
        console.print(Text.assemble("identical: ", (verdict, "bold green" if identical else "bold red")))
    else:
        console.print("identical: not expected; sampled texts agree in law, not token by token")
    return identical


def _ignore(commitment: Commitment) -> None:
    """Listens to nothing."""


def _table(fast: Timed, slow: Timed) -> Table:
    record = fast.record
    positions = " ".join(f"{share:.2f}" for share in record.acceptance_by_position)
    table = Table(
        "",
        "speculative",
        "plain",
        box=box.SIMPLE_HEAD,
        header_style=QUIET,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("tokens", str(len(fast.tokens)), str(len(slow.tokens)))
    table.add_row("target passes", str(record.target_passes), str(slow.record.target_passes))
    table.add_row("block efficiency", _number(record.block_efficiency), _number(slow.record.block_efficiency))
    table.add_row("acceptance by position", positions or "-", "")
    table.add_row("MBSU", _number(record.mbsu), _number(slow.record.mbsu))
    table.add_row("time", f"{fast.seconds * 1e3:.0f} ms", f"{slow.seconds * 1e3:.0f} ms")
    return table


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
