"""From examples to the tensors of a step: what the draft reads, and what the target reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch

from fastspec.training.datasets import Item
from fastspec.training.template import Example

#: A row's tokens and which of them are to be learned.
Row = tuple[list[int], list[bool]]

IGNORED = -100


class Collator:
    """Pads rows on the right; a text-only draft's are without image tokens, the target's with all of them.

    Beside ``input_ids``, ``attention_mask`` and ``labels`` ``[B, L]`` a part has ``answers`` ``[M]``, the tokens to be
    learned, and ``places`` ``[M]``, where they come next: indices into ``[B · L]``. The answers of the draft's part are
    those of the target's, in the same order. ``faults`` are those of lines that gave nothing, if there are any.

    Args:
        processor: the target's.
        image_token_id: the placeholder.
        pad_token_id: what rows are padded with; nothing ever attends to it.
        with_target: whether the batch has a part ``target``.
        draft_sees_images: whether the draft's rows are the target's, images included.
        image_pooling: side of the squares of image features that become one image token of the draft's.
    """

    def __init__(
        self,
        processor: Any,
        image_token_id: int,
        pad_token_id: int,
        with_target: bool,
        draft_sees_images: bool,
        image_pooling: int = 1,
    ):
        self._processor, self._placeholder, self._pad = processor, image_token_id, pad_token_id
        self._with_target, self._draft_sees_images = with_target, draft_sees_images
        self._features_per_token = image_pooling**2

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        examples = [example for example, _ in items]
        batch: dict[str, Any] = {}
        if self._with_target or self._draft_sees_images:
            rows, pixels = self._with_images(items)
            batch["target"] = self._pad_rows(rows) | pixels
        if self._draft_sees_images:
            batch |= self._pad_rows([self._pooled(row) for row in rows]) | pixels
        else:
            batch |= self._pad_rows([self._without_images(example) for example in examples])
        if not self._with_target:
            batch.pop("target", None)
        if faults := [example.fault for example in examples if example.fault]:
            batch["faults"] = faults
        return batch

    def _without_images(self, example: Example) -> Row:
        kept = [index for index, token in enumerate(example.ids) if token != self._placeholder]
        return [example.ids[index] for index in kept], [example.spoken[index] for index in kept]

    def _pooled(self, row: Row) -> Row:
        """The row with one placeholder for each square of image features."""
        ids, spoken = row
        places = count()
        kept = [
            index
            for index, token in enumerate(ids)
            if token != self._placeholder or next(places) % self._features_per_token == 0
        ]
        return [ids[index] for index in kept], [spoken[index] for index in kept]

    def _with_images(self, items: Sequence[Item]) -> tuple[list[Row], dict[str, torch.Tensor]]:
        rows: list[Row] = [(list(example.ids), list(example.spoken)) for example, _ in items]
        shown = [index for index, (_, pictures) in enumerate(items) if pictures]
        if not shown:
            return rows, {}
        made = self._processor(
            text=[items[index][0].text for index in shown],
            images=[picture for index in shown for picture in items[index][1]],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        for index, ids, mask in zip(shown, made.pop("input_ids"), made.pop("attention_mask"), strict=True):
            rows[index] = expand(items[index][0], ids[mask.bool()].tolist())
        return rows, dict(made)

    def _pad_rows(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        shape = (len(rows), max(len(ids) for ids, _ in rows))
        input_ids = torch.full(shape, self._pad)
        labels = torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.int64)
        for index, (ids, spoken) in enumerate(rows):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            labels[index, : len(ids)] = torch.where(torch.tensor(spoken), torch.tensor(ids), IGNORED)
            mask[index, : len(ids)] = 1
        labels[:, 0] = IGNORED  # nothing predicts the first token
        # Found here, where nobody waits for a device.
        places = (labels.flatten() != IGNORED).nonzero()[:, 0] - 1
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": labels,
            "places": places,
            "answers": labels.flatten()[places + 1],
        }


def expand(example: Example, processed: Sequence[int]) -> Row:
    """The example with the image tokens, and whatever else the processor put around them.

    Args:
        example: with one placeholder per image.
        processed: the processor's tokens of its text.

    Raises:
        ValueError: if the example's tokens are not among the processor's in their order.
    """
    ids: list[int] = []
    spoken: list[bool] = []
    place = 0
    for token in processed:
        if place == example.num_text:
            break
        ids.append(token)
        matches = token == example.ids[place]
        spoken.append(matches and example.spoken[place])
        place += matches
    if place != example.num_text:
        raise ValueError("the processor's tokens are not those of its tokenizer with images put in")
    return ids + list(example.ids[place:]), spoken + list(example.spoken[place:])
