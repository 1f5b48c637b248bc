"""Decoders kept between calls of ``generate``, with their caches and captured graphs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from fastspec.draft import Draft, ImageDraft
from fastspec.model.vision import text_stack

if TYPE_CHECKING:
    from fastspec.decoder import SpeculativeDecoder

#: Decoders kept per target: say, one with a draft and one that decodes plainly.
MOST_KEPT = 2


class _Entry(NamedTuple):
    draft: Callable[[], object]  # a weak reference to the model, or what returns the name
    shape: Hashable
    weights: tuple[int, ...]
    decoder: SpeculativeDecoder


class DecoderCache:
    """The last decoders of each target, taken out while in use.

    Neither target nor draft is kept alive: a decoder goes with the first of the two models.
    """

    def __init__(self):
        self._entries: weakref.WeakKeyDictionary[nn.Module, list[_Entry]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def take(
        self,
        target: nn.Module,
        draft: object,
        shape: Hashable,
        capacity: int,
        build: Callable[[], SpeculativeDecoder],
    ) -> SpeculativeDecoder:
        """A decoder of at least the capacity for exactly these models, kept or built.

        Args:
            target: the target model.
            draft: the draft as the user passed it: a model, a name, or a :class:`Draft`, whose buffers are its
                own, so that its decoder is never kept.
            shape: what else the decoder must have been built with.
            capacity: tokens per sequence that it must hold.
            build: makes one if there is none.
        """
        with self._lock:
            kept = self._entries.get(target, [])
            for entry in [one for one in kept if _same(one.draft(), draft) and one.shape == shape]:
                # Taken out in any case: one that is too small, or whose weights have moved, makes room.
                kept.remove(entry)
                if entry.decoder.capacity >= capacity and entry.weights == _addresses(target, draft):
                    if isinstance(entry.decoder.draft, ImageDraft):
                        entry.decoder.draft.model = draft
                    return entry.decoder
                del entry
            del kept[: max(0, len(kept) + 1 - MOST_KEPT)]
        return build()

    def give_back(
        self, target: nn.Module, draft: object, shape: Hashable, decoder: SpeculativeDecoder
    ) -> None:
        """Keeps a decoder for the next call; the arguments are those of :meth:`take`."""
        if isinstance(draft, Draft):
            return
        decoder.logits_hook = None
        if isinstance(decoder.draft, ImageDraft):
            decoder.draft.model = None
        if isinstance(draft, nn.Module):
            owner, identity = weakref.ref(target), id(decoder)
            reference = weakref.ref(draft, lambda _: self._forget(owner, identity))
        else:
            reference = lambda: draft  # noqa: E731
        entry = _Entry(reference, shape, _addresses(target, draft), decoder)
        with self._lock:
            kept = self._entries.setdefault(target, [])
            kept.append(entry)
            del kept[:-MOST_KEPT]

    def clear(self) -> None:
        """Lets all decoders go."""
        with self._lock:
            self._entries.clear()

    def _forget(self, target: weakref.ref, decoder_id: int) -> None:
        model = target()
        kept = self._entries.get(model, []) if model is not None else []
        # The collector may call this at any time, in any thread, with the lock held: what another thread has taken
        # out meanwhile must stay out.
        for entry in [one for one in kept if id(one.decoder) == decoder_id]:
            with suppress(ValueError):
                kept.remove(entry)


def _same(kept: object, draft: object) -> bool:
    return kept is draft or (isinstance(draft, str) and kept == draft)


def _addresses(target: nn.Module, draft: object) -> tuple[int, ...]:
    """Where the weights lie: they move with ``model.to``, and a captured graph does not follow them."""
    models = [target, draft] if isinstance(draft, nn.Module) else [target]
    return tuple(
        parameter.data_ptr()
        for model in models
        for part in text_stack(model)
        for parameter in part.parameters()
    )
