"""From dialogues to token ids, the same for training and for inference. Needs `tokenizers` alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .language import TASKS, Example
from .scenes import PATCH, SIDE

VOCABULARY = 1024
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNK, BOS, EOS, PAD, IMAGE = range(len(SPECIALS))
IMAGE_TOKENS = (SIDE // PATCH) ** 2

# LLaVA-1.5's: "USER: <image>\nquestion ASSISTANT: answer</s>USER: question ASSISTANT:".
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set images, text = 0, message['content'] %}"
    "{% else %}"
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list | length %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + text + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}"
    "{{ 'USER: ' + '<image>\\n' * images + text + ' ' }}"
    "{% else %}{{ text + ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def question_text(user: str, image: bool) -> str:
    """A user's turn as the models see it, up to where the assistant begins."""
    return f"USER: {'<image>' if image else ''}{chr(10) if image else ''}{user} ASSISTANT:"


def answer_text(assistant: str) -> str:
    return f" {assistant}</s>"


def prompt_text(turns: Sequence[tuple[str, str]], last: int = 0, image: bool = True) -> str:
    """The dialogue up to the assistant's answer number `last`, ready for the processor."""
    text = ""
    for index, (user, assistant) in enumerate(turns[: last + 1]):
        text += question_text(user, image and index == 0)
        if index < last:
            text += answer_text(assistant)
    return text


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE: whatever a user types has an encoding. `<s>` is put in front, as LLaVA does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def corpus(seed: int, count: int) -> Iterable[str]:
    """Texts for the tokenizer, chat format and all."""
    rng = Random(f"tokenizer {seed}")
    for index in range(count):
        example = Example.random(TASKS[index % len(TASKS)], rng)
        for user, assistant in example.turns:
            yield question_text(user, False)
            yield " " + assistant


def load_tokenizer(folder: str | Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.no_padding()  # the pieces of a dialogue must not be padded to one length
    tokenizer.no_truncation()
    return tokenizer


def encode(
    tokenizer: Tokenizer, turns: Sequence[tuple[str, str]], image: bool
) -> tuple[list[int], list[bool]]:
    """Ids of a dialogue without its `<s>`, and which of them the assistant says (its `</s>` included).

    With `image` the first turn carries one `<image>`, not yet expanded.
    """
    pieces = []
    for index, (user, assistant) in enumerate(turns):
        pieces += [question_text(user, image and index == 0), answer_text(assistant)]
    ids, spoken = [], []
    for index, piece in enumerate(tokenizer.encode_batch(pieces, add_special_tokens=False)):
        ids += piece.ids
        spoken += [index % 2 == 1] * len(piece.ids)
    return ids, spoken
