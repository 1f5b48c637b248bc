"""Whether a draft speaks the target's vocabulary."""

from __future__ import annotations

#: Without tokenizers to compare, vocabularies whose sizes differ by less are taken for one with padding.
PADDING = 512


def check_vocabularies(
    target_size: int, draft_size: int, tokenizer: object = None, draft_tokenizer: object = None
) -> None:
    """Compares token-to-id maps where both tokenizers are given, sizes otherwise.

    A draft's vocabulary may be smaller or padded: ids it lacks are never proposed, ids the target lacks are
    never offered.

    Raises:
        TypeError: for a tokenizer that is none.
        ValueError: if a token has another id, or the sizes differ by more than padding explains.
    """
    if tokenizer is not None and draft_tokenizer is not None:
        ours, theirs = _ordinary_tokens(tokenizer), _ordinary_tokens(draft_tokenizer)
        wrong = [token for token, token_id in theirs.items() if ours.get(token, token_id) != token_id]
        ids = set(ours.values())
        wrong += [token for token, token_id in theirs.items() if token not in ours and token_id in ids]
        if wrong:
            token = wrong[0]
            raise ValueError(
                f"target and draft vocabularies disagree on {len(wrong)} tokens, for example {token!r}: "
                f"id {ours.get(token)} in the target's, {theirs[token]} in the draft's"
            )
        return
    if abs(target_size - draft_size) >= PADDING:
        raise ValueError(
            f"the draft's vocabulary has {draft_size} tokens and the target's {target_size}; if they agree "
            "on the shared ids, pass tokenizer and draft_tokenizer"
        )


def _ordinary_tokens(tokenizer: object) -> dict[str, int]:
    """Token-to-id map without the added special tokens, which need not be shared."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
    if not hasattr(tokenizer, "get_added_vocab"):
        raise TypeError(f"expected a tokenizer or processor of transformers, got {type(tokenizer).__name__}")
    added = tokenizer.get_added_vocab()
    return {token: token_id for token, token_id in tokenizer.get_vocab().items() if token not in added}
