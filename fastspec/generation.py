"""Drop-in generation: transformers' arguments in, transformers' outputs out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from fastspec.decoder import (
    CYCLES_AHEAD,
    MAX_BATCH_SIZE,
    Request,
    SpeculativeDecoder,
    check_pair,
    check_target,
    resolve_tree,
)
from fastspec.delivery import Delivery
from fastspec.draft import Draft, make_draft
from fastspec.draft.sharing import encode_shared
from fastspec.metrics import SpeculationRecord
from fastspec.model.vision import Prompt, check_pixel_values, deal_images, image_token_id
from fastspec.processors import ProcessorHook, translate
from fastspec.runtime.decoder_cache import DecoderCache
from fastspec.sampling import SamplingParams
from fastspec.shape import GammaHistory
from fastspec.state import FinishReason
from fastspec.tree import DraftTree
from fastspec.verification import Rule

#: Arguments of transformers' own assisted generation, and what they are called here.
_ASSISTED = {
    "assistant_model": "draft",
    "assistant_tokenizer": "draft_tokenizer",
    "num_assistant_tokens": "gamma",
    "num_assistant_tokens_schedule": "gamma",
    "assistant_confidence_threshold": "gamma or tree",
    "assistant_early_exit": "draft",
    "assistant_lookbehind": "draft_tokenizer",
    "target_lookbehind": "draft_tokenizer",
    "prompt_lookup_num_tokens": "draft='ngram' and gamma",
    "max_matching_ngram_size": "draft=fastspec.draft.NgramDraft(max_ngram=...)",
}
#: Settings of a generation config that change the algorithm: attribute, neutral values, what it is called.
_UNSUPPORTED = (
    ("num_beams", (None, 1), "beam search"),
    ("num_beam_groups", (None, 1), "group beam search"),
    ("constraints", (None,), "constrained beam search"),
    ("force_words_ids", (None,), "constrained beam search"),
    ("penalty_alpha", (None, 0), "contrastive search"),
    ("dola_layers", (None,), "DoLa decoding"),
    ("guidance_scale", (None, 1), "classifier-free guidance"),
    ("prompt_lookup_num_tokens", (None,), "transformers' prompt lookup; use draft='ngram'"),
    ("assistant_early_exit", (None,), "early-exit self-speculation"),
    ("use_mtp", (None, False), "multi-token prediction"),
    ("output_attentions", (None, False), "returning attentions"),
    ("output_hidden_states", (None, False), "returning hidden states"),
    ("use_cache", (None, True), "decoding without a cache"),
    ("cache_implementation", (None,), "another cache (fastspec keeps its own static one)"),
    ("prefill_chunk_size", (None,), "chunked prefill"),
    ("token_healing", (None, False), "token healing"),
)
#: Arguments that describe images; :func:`make_prompts` reads them.
_IMAGE_ARGUMENTS = (
    "pixel_values",
    "image_sizes",
    "batch_num_images",
    "vision_aspect_ratio",
    "vision_feature_layer",
    "vision_feature_layers",
    "vision_feature_select_strategy",
)
_CAPACITY_STEP = 256
_decoders = DecoderCache()
_history = GammaHistory()


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """transformers' output with the statistics of the speculation.

    Attributes:
        speculation: a :class:`fastspec.metrics.SpeculationRecord`.
    """

    speculation: SpeculationRecord | None = None


def generate(
    target: nn.Module,
    inputs: torch.Tensor | None = None,
    *,
    draft: object = None,
    gamma: int | str | None = None,
    tree: DraftTree | None = None,
    rule: Rule | str | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    tokenizer: object = None,
    draft_tokenizer: object = None,
    streamer: BaseStreamer | None = None,
    **kwargs: Any,
) -> torch.Tensor | SpeculativeOutput:
    """Generates as ``target.generate(**kwargs)`` does, with the same law of answers, by speculative decoding.

    Args:
        target: a LLaVA-shaped model of transformers.
        inputs: ``input_ids``, if not passed by that name.
        draft: a causal language model, a LLaVA-shaped model (it gets the image too) or ``"ngram"``.
        gamma: drafted tokens per cycle, 5 unless given. ``"auto"`` begins with 5 and goes by what earlier calls
            with the same models accepted.
        tree: a :class:`fastspec.DraftTree` instead of a chain.
        rule: the acceptance rule, see :class:`fastspec.verification.Rule`; the default fits draft and tree.
        seed: makes sampling reproducible. An integer gives sequence b the seed ``seed + b``; a list gives
            each sequence its own.
        generator: where seeds are drawn from if there is no ``seed``; torch's default generator otherwise.
        tokenizer, draft_tokenizer: checked against each other; ``tokenizer`` also serves ``stop_strings``.
        streamer: as in transformers; tokens come as they are committed.
        **kwargs: everything else ``target.generate`` takes, with its names and defaults.

    Returns:
        ``[B, L + T]`` token ids, or with ``return_dict_in_generate`` a :class:`SpeculativeOutput`. Scores and
        logits of sequences that have ended are those of a row of zeros; ``past_key_values`` is None, for the
        cache is fastspec's own.

    Raises:
        TypeError, ValueError: before any work, for what cannot be honoured; no argument is ever dropped.

    Example:
        >>> output = fastspec.generate(target, draft=draft, gamma=5, **inputs, max_new_tokens=100)
    """
    check_target(target)
    for name, ours in _ASSISTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} belongs to transformers' assisted generation; here it is {ours}")
    if kwargs.get("custom_generate") is not None:
        raise ValueError("fastspec.generate is itself a custom_generate; call target.generate to use another")
    if kwargs.get("synced_gpus"):
        raise ValueError(
            "synced_gpus=True cannot be honoured: a model sharded over processes is not supported"
        )
    # Some of these never reach the loop: transformers acts on them, or fails, first.
    check_config({name: _setting(target, kwargs, name) for name, *_ in _UNSUPPORTED})
    if kwargs.get("past_key_values") is not None:
        raise ValueError(
            "past_key_values cannot be honoured: fastspec keeps its own cache; pass the whole prompt"
        )
    pixel_values = kwargs.get("pixel_values")
    if pixel_values is not None:
        check_pixel_values(target, pixel_values)
    if inputs is not None and kwargs.get("input_ids") is not None:
        raise ValueError("pass inputs or input_ids, not both")
    if inputs is not None:
        kwargs["input_ids"] = inputs
    _check_input_ids(target, kwargs)
    # transformers drops a mask of ones before the loop could compare.
    _check_attention_mask(kwargs.get("attention_mask"), kwargs["input_ids"])

    kwargs, stop_strings = _take_stop_strings(target, kwargs)
    loop = custom_generate(
        draft,
        gamma=gamma,
        tree=tree,
        rule=rule,
        seed=seed,
        generator=generator,
        tokenizer=tokenizer,
        draft_tokenizer=draft_tokenizer,
        streamer=streamer,
        stop_strings=stop_strings,
    )
    loop.check(target)
    # Images go past transformers, which would encode them before the loop could check anything.
    images = {name: kwargs.pop(name) for name in _IMAGE_ARGUMENTS if kwargs.get(name) is not None}
    return target.generate(**kwargs, custom_generate=replace(loop, images=images, checked=True))


def clear_decoders() -> None:
    """Lets go of the decoders that :func:`generate` keeps for later calls, with their caches and captured graphs."""
    _decoders.clear()


def custom_generate(
    draft: object,
    *,
    gamma: int | str | None = None,
    tree: DraftTree | None = None,
    rule: Rule | str | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    tokenizer: object = None,
    draft_tokenizer: object = None,
    streamer: BaseStreamer | None = None,
    stop_strings: str | list[str] | None = None,
    pixel_values: torch.Tensor | None = None,
) -> DecodingLoop:
    """fastspec through transformers' own door: ``target.generate(..., custom_generate=custom_generate(draft))``.

    transformers does not hand ``streamer``, ``tokenizer`` and ``stop_strings`` on to a custom loop (and from
    5.18 on ``pixel_values``, which an image draft needs): bind them here. The arguments are those of
    :func:`generate`.
    """
    if stop_strings is not None and tokenizer is None:
        raise ValueError("stop_strings needs tokenizer, got None")
    made = make_draft(draft)
    follows = gamma == "auto"
    if follows and tree is not None:
        raise ValueError("pass gamma or tree, not both")
    return DecodingLoop(
        source=draft,
        draft=made,
        tree=resolve_tree(made, None if follows else gamma, tree),
        follows=follows,
        rule=rule,
        seed=seed,
        generator=generator,
        tokenizer=tokenizer,
        draft_tokenizer=draft_tokenizer,
        streamer=streamer,
        stop_strings=stop_strings,
        images={} if pixel_values is None else {"pixel_values": pixel_values},
    )


@dataclass(frozen=True)
class DecodingLoop:
    """The callable that transformers' ``generate`` runs in place of its own sampling loop."""

    source: object
    draft: Draft
    tree: DraftTree
    follows: bool  # whether the tree is a chain as long as earlier calls suggest
    rule: Rule | str | None
    seed: int | Sequence[int] | None
    generator: torch.Generator | None
    tokenizer: object
    draft_tokenizer: object
    streamer: BaseStreamer | None
    stop_strings: str | list[str] | None
    images: dict[str, Any]
    checked: bool = False  # whether :meth:`check` has passed

    def check(self, target: nn.Module) -> None:
        """Raises for a draft, rule or vocabulary that does not fit the target, before any work."""
        check_pair(target, self.draft, self.tree, self.rule, self.tokenizer, self.draft_tokenizer)

    def __call__(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor | SpeculativeOutput:
        if not self.checked:
            self.check(model)  # a decoder that is kept may have been made with other tokenizers
        check_autocast(model)
        check_config({name: getattr(generation_config, name, None) for name, *_ in _UNSUPPORTED})
        batch, length = input_ids.shape
        if batch > MAX_BATCH_SIZE:
            raise ValueError(f"at most {MAX_BATCH_SIZE} sequences are decoded together, got {batch}")
        starts = prompt_starts(input_ids, model_kwargs)
        check_leftovers(model_kwargs)
        seeds = self._seeds(batch)
        do_sample = bool(generation_config.do_sample)
        eos = _as_list(getattr(generation_config, "_eos_token_tensor", None))
        translated = translate(logits_processor, length, starts, eos)
        new_tokens = generation_config.max_length - length
        needed = length - min(starts) + new_tokens
        capacity = _round_capacity(model, needed)
        self.draft.attach(model)
        prompts = make_prompts(
            model,
            input_ids,
            starts,
            model_kwargs,
            copies=generation_config.num_return_sequences or 1,
            images=self.images,
        )
        requests = [
            Request(
                prompt,
                new_tokens,
                translated.params(prompt.num_tokens, do_sample),
                seed=seed,
                eos_token_ids=tuple(eos),
                padding_ids=tuple(row[:start].unique().tolist()) if translated.penalises_padding else (),
            )
            for prompt, seed, row, start in zip(prompts, seeds, input_ids, starts, strict=True)
        ]
        foreign = None
        if translated.foreign:
            lengths = [prompt.num_tokens for prompt in prompts]
            foreign = ProcessorHook(logits_processor, input_ids, lengths)
            plain = SamplingParams(temperature=float(do_sample))
            requests = [replace(one, params=plain, draft_params=one.params) for one in requests]

        returns_dict = bool(generation_config.return_dict_in_generate)
        delivery = Delivery(
            input_ids,
            _pad_token(generation_config, eos),
            self._host_criteria(stopping_criteria, generation_config, eos),
            self.streamer,
            logits_processor if returns_dict and generation_config.output_scores else None,
            keep_logits=returns_dict and bool(generation_config.output_logits),
        )
        tree = DraftTree.chain(_history.gamma(model, self.source)) if self.follows else self.tree
        shape = (tree, self.rule, batch)
        decoder = _decoders.take(
            model, self.source, shape, needed, lambda: self._new_decoder(model, tree, batch, capacity)
        )
        try:
            decoder.logits_hook = foreign
            run(decoder, requests, delivery, self.streamer)
            record = replace(decoder.record(batch), drafted=tuple(map(tuple, delivery.drafted)))
            if self.follows:
                _history.add(model, self.source, record)
        except MemoryError:
            decoder = None  # what it holds may be what the next one needs
            raise
        finally:
            if decoder is not None:
                _decoders.give_back(model, self.source, shape, decoder)
        for row, reason in enumerate(record.finish_reasons):
            if reason == FinishReason.INVALID_LOGITS:
                warnings.warn(
                    f"sequence {row} ended early: the target's logits were NaN or infinite", stacklevel=2
                )
        if not returns_dict:
            return delivery.sequences
        return SpeculativeOutput(
            sequences=delivery.sequences,
            scores=tuple(delivery.scores) if generation_config.output_scores else None,
            logits=tuple(delivery.logits) if generation_config.output_logits else None,
            speculation=record,
        )

    def _new_decoder(
        self, model: nn.Module, tree: DraftTree, batch: int, capacity: int
    ) -> SpeculativeDecoder:
        # A draft's buffers are its decoder's: each decoder that is kept has a draft of its own.
        return SpeculativeDecoder(
            model,
            self.source,
            tree=tree,
            rule=self.rule,
            batch_size=batch,
            capacity=capacity,
            tokenizer=self.tokenizer,
            draft_tokenizer=self.draft_tokenizer,
        )

    def _seeds(self, batch: int) -> list[int]:
        if self.seed is None:
            device = None if self.generator is None else self.generator.device
            return torch.randint(2**63 - 1, (batch,), generator=self.generator, device=device).tolist()
        if isinstance(self.seed, Integral):
            return [int(self.seed) + row for row in range(batch)]
        if not isinstance(self.seed, Sequence) or not all(isinstance(seed, Integral) for seed in self.seed):
            raise TypeError(f"seed must be an integer or a list of integers, got {self.seed!r}")
        seeds = [int(seed) for seed in self.seed]
        if len(seeds) != batch:
            raise ValueError(f"seed must be an integer or a list of {batch} integers, got {len(seeds)}")
        return seeds

    def _host_criteria(
        self, criteria: StoppingCriteriaList, config: GenerationConfig, eos: list[int]
    ) -> StoppingCriteriaList:
        """The criteria that the device does not judge itself."""
        judged = StoppingCriteriaList()
        for criterion in criteria:
            if type(criterion) is MaxLengthCriteria and criterion.max_length == config.max_length:
                continue
            if type(criterion) is EosTokenCriteria and set(_as_list(criterion.eos_token_id)) <= set(eos):
                continue
            judged.append(criterion)
        if self.stop_strings is not None:
            judged.append(StopStringCriteria(stop_strings=self.stop_strings, tokenizer=self.tokenizer))
        return judged


def run(
    decoder: SpeculativeDecoder,
    requests: list[Request],
    delivery: Delivery,
    streamer: BaseStreamer | None = None,
) -> None:
    """Decodes the requests to their end and hands every commitment to the delivery."""
    if streamer is not None:
        streamer.put(delivery.sequences.cpu())
    try:
        for commitment in decoder.stream(requests, ahead=1 if delivery.wants_logits else CYCLES_AHEAD):
            logits = None
            if delivery.wants_logits:
                logits = [
                    decoder.last_logits[row, decoder.last_path[row, : len(tokens)]]
                    for row, tokens in enumerate(commitment.tokens)
                ]
            for row in delivery.push(commitment, logits):
                decoder.stop(row)
    finally:
        if streamer is not None:
            streamer.end()


def check_config(settings: dict[str, Any]) -> None:
    """Raises ValueError for a way of generating that is not sampling or greedy decoding."""
    for name, neutral, description in _UNSUPPORTED:
        value = settings[name]
        if value not in neutral:
            raise ValueError(f"{name}={value!r} cannot be honoured: {description} is not supported")


def check_autocast(model: nn.Module) -> None:
    """Raises ValueError where torch.autocast would compute in another precision than that of the caches."""
    device, dtype = model.device.type, model.get_input_embeddings().weight.dtype
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != dtype:
        raise ValueError(
            f"torch.autocast to {torch.get_autocast_dtype(device)} cannot be honoured for a model in {dtype}: "
            "load the model in that precision instead"
        )


def check_leftovers(model_kwargs: dict) -> None:
    """Raises ValueError for a model argument that nothing will use."""
    cache = model_kwargs.pop("past_key_values", None)
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("past_key_values with content cannot be honoured: pass the whole prompt")
    known = (*_IMAGE_ARGUMENTS, "mm_encoder_outputs", "use_cache", "logits_to_keep", "return_dict")
    left = sorted(name for name, value in model_kwargs.items() if value is not None and name not in known)
    if left:
        raise ValueError(f"these arguments cannot be honoured: {', '.join(left)}")


def prompt_starts(input_ids: torch.Tensor, model_kwargs: dict) -> list[int]:
    """Where each prompt begins after its left padding; takes ``attention_mask`` and ``position_ids``."""
    length = input_ids.shape[1]
    mask = model_kwargs.pop("attention_mask", None)
    _check_attention_mask(mask, input_ids)
    if mask is None:
        mask = torch.ones_like(input_ids)
    mask = (mask != 0).long()
    starts = (length - mask.sum(1)).tolist()
    for row, start in enumerate(starts):
        if start == length:
            raise ValueError(f"prompt {row} is empty: its attention_mask has no ones")
        if not mask[row, start:].all():
            raise ValueError(f"prompt {row} must be padded on the left only (padding_side='left')")
    positions = model_kwargs.pop("position_ids", None)
    if positions is not None:
        expected = (mask.cumsum(1) - 1).to(positions.device)
        real = mask.bool().to(positions.device)
        if positions.shape != expected.shape or (positions != expected)[real].any():
            raise ValueError(
                "position_ids must count from 0 at each prompt's first token; others are not supported"
            )
    return starts


def make_prompts(
    model: nn.Module,
    input_ids: torch.Tensor,
    starts: list[int],
    model_kwargs: dict,
    copies: int = 1,
    images: dict[str, Any] | None = None,
) -> list[Prompt]:
    """Prompts with their images; encodes each image once however many sequences its prompt returns.

    Args:
        model: the target.
        input_ids: ``[B, L]``, each prompt ``copies`` times in a row.
        starts: where each prompt begins after its padding.
        model_kwargs: ``pixel_values`` with what belongs to them, or ``mm_encoder_outputs``.
        copies: ``num_return_sequences``, by which transformers has repeated prompts and ``model_kwargs``.
        images: ``pixel_values`` with what belongs to them, each image once, if they came past transformers.
    """
    placeholder = image_token_id(model)
    rows = [ids[start:].to(model.device, torch.int64) for ids, start in zip(input_ids, starts, strict=True)]
    counts = [int((row == placeholder).sum()) for row in rows]
    given = {name: model_kwargs[name] for name in _IMAGE_ARGUMENTS if model_kwargs.get(name) is not None}
    encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
    images = dict(images or {})
    # The first of each run of copies is enough.
    images |= {name: value[::copies] if torch.is_tensor(value) else value for name, value in given.items()}
    pixel_values = images.get("pixel_values")
    if encoded is not None:
        repeated = tuple(encoded.pooler_output)
        groups = [repeated[first:last] for first, last in deal_images(counts, repeated)[::copies]]
    elif pixel_values is not None:
        check_pixel_values(model, pixel_values)
        features = encode_shared(model, images)
        groups = [features[first:last] for first, last in deal_images(counts[::copies], features)]
    else:
        for row, count in enumerate(counts):
            if count:
                raise ValueError(
                    f"prompt {row} has {count} image placeholders but no pixel_values were passed"
                )
        groups = [()] * len(counts[::copies])

    prompts, first = [], 0
    for index, group in enumerate(groups):
        own = None if pixel_values is None or not group else pixel_values[first : first + len(group)]
        first += len(group)
        prompts += [
            Prompt(ids, placeholder, group, own, checked=True)
            for ids in rows[index * copies : (index + 1) * copies]
        ]
    return prompts


def _check_input_ids(target: nn.Module, kwargs: dict) -> None:
    input_ids = kwargs.get("input_ids")
    if input_ids is None:
        raise ValueError(
            "input_ids are missing: pass what the model's processor returns (inputs_embeds is not supported)"
        )
    kinds = (torch.int64, torch.int32)
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.dtype not in kinds:
        given = (
            f"{list(input_ids.shape)} {input_ids.dtype}"
            if isinstance(input_ids, torch.Tensor)
            else type(input_ids)
        )
        raise TypeError(f"input_ids must be an int64 or int32 tensor [batch, length], got {given}")
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids must not be empty, got shape {list(input_ids.shape)}")
    size = target.get_input_embeddings().weight.shape[0]
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= size:
        raise ValueError(f"input_ids must be in [0, {size}), got values from {low} to {high}")


def _check_attention_mask(mask: Any, input_ids: torch.Tensor) -> None:
    expected = list(input_ids.shape)
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention_mask must be a tensor {expected}, got {type(mask)}")
    if list(mask.shape) != expected:
        raise ValueError(f"attention_mask must have shape {expected} as input_ids, got {list(mask.shape)}")


def _setting(target: nn.Module, kwargs: dict, name: str) -> Any:
    """A generation setting as transformers finds it: an argument, the config passed, or the model's own."""
    configs = (kwargs.get("generation_config"), target.generation_config)
    given = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in given if value is not None), None)


def _take_stop_strings(target: nn.Module, kwargs: dict) -> tuple[dict, str | list[str] | None]:
    """Stop strings out of the arguments: transformers loses the tokenizer on the way to a custom loop."""
    stop_strings = _setting(target, kwargs, "stop_strings")
    if stop_strings is None:
        return kwargs, None
    return {**kwargs, "stop_strings": None}, stop_strings


def _pad_token(config: GenerationConfig, eos: list[int]) -> int:
    pad = _as_list(getattr(config, "_pad_token_tensor", None))
    return (pad or eos or [0])[0]


def _as_list(ids: torch.Tensor | None) -> list[int]:
    return [] if ids is None else torch.as_tensor(ids).flatten().tolist()


def _round_capacity(model: nn.Module, needed: int) -> int:
    limit = model.config.get_text_config().max_position_embeddings
    if needed > limit:
        raise ValueError(
            f"prompt and new tokens need {needed} positions, but the target's max_position_embeddings is {limit}"
        )
    return min(limit, -(-needed // _CAPACITY_STEP) * _CAPACITY_STEP)
