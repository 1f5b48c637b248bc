"""The demo: the miniature LLaVA describes a picture, speculatively and plainly, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastspec.decoder import Commitment, Request, SpeculativeDecoder
from fastspec.images import load_image
from fastspec.metrics import SpeculationRecord
from fastspec.sampling import SamplingParams

DRAFTED = "bold green"


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
        line = Text()
        space = piece[: len(piece) - len(piece.lstrip())]
        if self._open and not drafted:
            line.append("]", DRAFTED)
        line.append(space)
        if drafted and not self._open:
            line.append("[", DRAFTED)
        line.append(piece[len(space) :], DRAFTED if drafted else "")
        self._open = drafted
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
    from fastspec.model.vision import Prompt, encode_images, image_token_id

    processor = miniature.load_processor()
    target, draft = miniature.load_target(device=device), miniature.load_draft(device=device)
    if image is None:
        example = miniature.sample_example("caption", seed)
        picture = example.scene.render()
        question = prompt or example.turns[0][0]
        picture.resize((384, 384)).save(save)
        console.print(f"picture: {save.resolve()} (drawn; --image takes one of yours)")
    else:
        picture, question = load_image(image), prompt or "Describe the picture."
        console.print(f"picture: {Path(image).resolve()}")
    console.print(f"question: {question}", markup=False)

    inputs = miniature.prepare(processor, picture, question).to(device)
    features = encode_images(target, {"pixel_values": inputs["pixel_values"]})
    request = Request(
        Prompt(inputs["input_ids"][0], image_token_id(target), features, inputs["pixel_values"]),
        max_new_tokens,
        SamplingParams(temperature=temperature),
        seed=seed,
        eos_token_ids=(processor.tokenizer.eos_token_id,),
    )
    speculative = SpeculativeDecoder(target, draft, gamma=gamma)
    plain = SpeculativeDecoder(target, None)
    for decoder in (speculative, plain):
        decode(decoder, request, lambda commitment: None)  # first calls pay for lazy initialisation

    console.print(
        "answer, [drafted and accepted] tokens in brackets, the target's own outside:\n", markup=False
    )
    stream = MarkedStream(console, processor.tokenizer)
    fast = decode(speculative, request, stream)
    stream.close()
    slow = decode(plain, request, lambda commitment: None)
    identical = fast.tokens == slow.tokens
    console.print()
    console.print(_table(fast, slow, identical, temperature))
    return identical


def _table(fast: Timed, slow: Timed, identical: bool, temperature: float) -> Table:
    record = fast.record
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("tokens", str(len(fast.tokens))),
        ("target passes", f"{record.target_passes} (plain: {slow.record.target_passes})"),
        ("block efficiency", f"{record.block_efficiency:.2f} tokens per target pass"),
        ("acceptance by position", " ".join(f"{share:.2f}" for share in record.acceptance_by_position)),
        ("memory-bound speed-up", f"{record.mbsu:.2f}x (c = {record.cost_ratio:.4f})"),
        ("time, speculative", f"{fast.seconds * 1e3:.0f} ms"),
        ("time, plain", f"{slow.seconds * 1e3:.0f} ms ({slow.seconds / fast.seconds:.2f}x)"),
    ]
    if temperature == 0:
        rows.append(("identical", "yes" if identical else "NO"))
    else:
        rows.append(("identical", "not expected: sampled texts agree in law, not token by token"))
    for name, value in rows:
        table.add_row(f"{name}:", value)
    return table
