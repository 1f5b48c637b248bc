"""fastspec.generate is target.generate: the same tokens, outputs, stops and calls."""

import copy
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from models import (
    IMAGE_SIZE,
    IMAGE_TOKEN_ID,
    IMAGE_TOKENS,
    left_padded,
    noisy_clone,
    picture_inputs,
    tiny_llama,
    tiny_llava,
)
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

import fastspec
from fastspec import DraftTree, Rule, SpeculativeDecoder
from fastspec.decoder import Request
from fastspec.generation import make_prompts
from fastspec.sampling import SamplingParams
from fastspec.state import FinishReason

TARGET = tiny_llava()
CLONE = noisy_clone(TARGET)
TEXT = tiny_llama()
GREEDY = {"do_sample": False, "max_new_tokens": 24}
TREE = DraftTree.from_children([[1, 2, 3], [4, 5], [6], [], [7], [], [], []])


class WordTokenizer:
    """Just enough of a tokenizer: token 7 is the word ' w7'."""

    def decode(self, ids, **_):
        return "".join(f" w{int(one)}" for one in torch.as_tensor(ids).flatten())


def both(inputs, draft=CLONE, **arguments):
    """Outputs of transformers and of fastspec for the same arguments."""
    ours = {name: arguments.pop(name) for name in ("gamma", "tree", "rule", "seed") if name in arguments}
    expected = TARGET.generate(**inputs, **arguments)
    return expected, fastspec.generate(TARGET, draft=draft, **ours, **inputs, **arguments)


SPECULATION = {
    "chain": {"gamma": 5},
    "chain of one": {"gamma": 1},
    "token-level": {"gamma": 3, "rule": "token_level"},
    "tree": {"tree": TREE},
    "traversal": {"tree": TREE, "rule": "traversal"},
    "target-only": {"tree": TREE, "rule": Rule.TARGET_ONLY},
    "drafter-invariant": {"gamma": 4, "rule": "drafter_invariant"},
}


@pytest.mark.parametrize("name", SPECULATION)
@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_equals_transformers(name, batch):
    for seed in range(3):
        expected, ours = both(picture_inputs(batch, seed=seed), **GREEDY, **SPECULATION[name])
        assert torch.equal(expected, ours)


@pytest.mark.parametrize("draft", [TEXT, "ngram", CLONE, TARGET], ids=["text", "ngram", "image", "itself"])
def test_any_draft_gives_the_same_text(draft):
    for seed in range(3):
        expected, ours = both(picture_inputs(2, seed=seed), draft=draft, **GREEDY)
        assert torch.equal(expected, ours)


def test_a_llava_draft_sees_the_image():
    """A copy of the target is accepted in full only if it gets the picture at prefill."""
    inputs = picture_inputs()
    output = fastspec.generate(
        TARGET, draft=TARGET, gamma=4, **inputs, **GREEDY, return_dict_in_generate=True
    )
    histogram = output.speculation.accepted[0]
    assert histogram[4] >= sum(histogram) - 1
    blind = noisy_clone(TARGET, noise=0.0)
    with torch.no_grad():
        blind.model.multi_modal_projector.linear_2.weight.zero_()
        blind.model.multi_modal_projector.linear_2.bias.zero_()
    without = fastspec.generate(
        TARGET, draft=blind, gamma=4, **inputs, **GREEDY, return_dict_in_generate=True
    )
    assert without.speculation.block_efficiency < output.speculation.block_efficiency


@torch.no_grad()
def test_an_image_draft_may_use_fewer_image_tokens():
    """Each of its images stands where the target's stood, as transformers would place it."""
    config = CLONE.config.to_dict()
    config["vision_config"] |= {"patch_size": 16}  # one token per image
    draft = LlavaForConditionalGeneration(LlavaConfig(**config)).eval()
    expected, ours = both(picture_inputs(2, images=2), draft=draft, **GREEDY)
    assert torch.equal(expected, ours)

    image, pixels = [IMAGE_TOKEN_ID], picture_inputs(1, images=2)["pixel_values"]
    ids = torch.tensor([[1, *image * 4, 9, 8, *image * 4, 11]])
    (prompt,) = make_prompts(TARGET, ids, [0], {"pixel_values": pixels})
    decoder = SpeculativeDecoder(TARGET, draft, capacity=64)
    embeddings = decoder.draft.prompt_embeddings(prompt)
    transformer = decoder.draft.transformer
    hidden = transformer.prefill(embeddings, transformer.new_cache(1, 16), 0)
    theirs = draft(input_ids=torch.tensor([[1, *image, 9, 8, *image, 11]]), pixel_values=pixels).logits[0]
    torch.testing.assert_close(transformer.logits(hidden), theirs, rtol=1e-4, atol=1e-5)


def test_token_ids_of_32_bits():
    inputs = picture_inputs(2)
    inputs["input_ids"] = inputs["input_ids"].int()
    expected, ours = both(inputs, **GREEDY)
    assert torch.equal(ours, expected)
    assert ours.dtype == expected.dtype


def test_prompts_of_different_lengths_padded_on_the_left():
    rows = [picture_inputs(text_tokens=n, seed=n)["input_ids"][0] for n in (3, 9, 6)]
    inputs = left_padded(rows)
    inputs["pixel_values"] = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE)
    for kind in SPECULATION.values():
        expected, ours = both(inputs, **GREEDY, **kind)
        assert torch.equal(expected, ours)


def test_several_images_per_prompt_and_prompts_without():
    image = torch.tensor([IMAGE_TOKEN_ID] * IMAGE_TOKENS)
    rows = [
        torch.cat([torch.tensor([1]), image, torch.tensor([9, 8]), image, torch.tensor([11])]),
        torch.tensor([1, 20, 21, 22]),
        torch.cat([torch.tensor([1, 5]), image, torch.tensor([30])]),
    ]
    inputs = left_padded(rows)
    inputs["pixel_values"] = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE)
    for draft in (CLONE, TEXT, "ngram"):
        expected, ours = both(inputs, draft=draft, **GREEDY)
        assert torch.equal(expected, ours)
    text_only = {"input_ids": rows[1][None], "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    expected, ours = both(text_only, **GREEDY)
    assert torch.equal(expected, ours)


def test_results_do_not_depend_on_the_place_in_the_batch():
    inputs = picture_inputs(3)
    arguments = {"do_sample": True, "max_new_tokens": 16, "top_k": 0}
    for kind in ({"gamma": 3}, {"tree": TREE}):
        together = fastspec.generate(TARGET, draft=CLONE, seed=[7, 8, 9], **inputs, **arguments, **kind)
        for row, seed in enumerate((7, 8, 9)):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            single = fastspec.generate(TARGET, draft=CLONE, seed=[seed], **alone, **arguments, **kind)
            end = single.shape[1]
            assert torch.equal(together[row, :end], single[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_length": 30},
        {"max_new_tokens": 20, "min_new_tokens": 18},
        {"max_new_tokens": 20, "min_length": 28},
        {"max_new_tokens": 20, "eos_token_id": [5, 17, 40]},
        {"max_new_tokens": 20, "eos_token_id": 40, "pad_token_id": 6},
        {"max_new_tokens": 20, "eos_token_id": [2, 64, 70_000, *range(100, 120)], "min_new_tokens": 5},
        {"max_new_tokens": 24, "repetition_penalty": 1.6},
        {"max_new_tokens": 24, "repetition_penalty": 0.8, "min_new_tokens": 10},
        {"max_new_tokens": 1},
        {"generation_config": GenerationConfig(max_new_tokens=9, eos_token_id=2, pad_token_id=0)},
    ],
    ids=str,
)
def test_arguments_are_honoured(arguments):
    for seed in range(4):
        for kind in ({"gamma": 4}, {"tree": TREE}):
            expected, ours = both(picture_inputs(2, seed=seed), do_sample=False, **arguments, **kind)
            assert torch.equal(expected, ours)


@pytest.mark.parametrize(
    "make",
    [
        lambda said: MinNewTokensLengthLogitsProcessor(13, 20, said),
        lambda said: MinLengthLogitsProcessor(33, said),
        lambda said: MinNewTokensLengthLogitsProcessor(3, 20, [2]),
    ],
    ids=["other ends", "other ends by length", "counted from elsewhere"],
)
def test_a_minimum_length_of_the_users_own_is_not_taken_for_the_built_in_one(make):
    """It may hold back other tokens than the ends of this call."""
    inputs = picture_inputs(2)
    said = TARGET.generate(**inputs, **GREEDY)[0, 16:19].tolist()
    with pytest.warns(UserWarning, match="run in Python at every drafted token"):
        expected, ours = both(inputs, **GREEDY, logits_processor=[make(said)])
    assert torch.equal(expected, ours)


def test_a_repetition_penalty_treats_padding_as_transformers_does():
    """5.17 counts it as seen, 5.23 does not; where padding is the end token, that decides when a text ends."""
    rows = [picture_inputs(text_tokens=n, seed=n)["input_ids"][0] for n in (3, 9)]
    pixels = picture_inputs(2)["pixel_values"]
    for penalty in (0.3, 1.5, 5.0):
        for padding in (37, 41, 47):  # what the model likes to say first
            inputs = {**left_padded(rows, pad_token_id=padding), "pixel_values": pixels}
            for given in (
                {"repetition_penalty": penalty},
                {"logits_processor": [RepetitionPenaltyLogitsProcessor(penalty)]},
            ):
                expected, ours = both(inputs, **GREEDY, **given)
                assert torch.equal(expected, ours)


def test_a_model_used_in_inference_mode_can_be_trained_afterwards():
    target = tiny_llava(seed=5)
    inputs = picture_inputs()
    with torch.inference_mode():
        ours = fastspec.generate(target, draft=TEXT, **inputs, **GREEDY)
        assert torch.equal(ours, target.generate(**inputs, **GREEDY))
    target(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert target.model.language_model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_the_models_generation_config_counts():
    target = noisy_clone(TARGET, noise=0.0)
    target.generation_config.max_new_tokens = 7
    target.generation_config.repetition_penalty = 1.4
    inputs = picture_inputs()
    assert torch.equal(target.generate(**inputs), fastspec.generate(target, draft=CLONE, **inputs))


@pytest.mark.parametrize(
    "arguments",
    [
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[10], [11, 12]]},
        {"suppress_tokens": list(range(20, 40)), "repetition_penalty": 1.3},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(4 + row, 50))},
        {"logits_processor": [NoRepeatNGramLogitsProcessor(3)], "min_new_tokens": 5},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_python_processors_run_at_every_node(arguments):
    for kind in ({"gamma": 3}, {"tree": TREE}):
        with pytest.warns(UserWarning, match="run in Python at every drafted token"):
            expected, ours = both(picture_inputs(2), do_sample=False, max_new_tokens=16, **arguments, **kind)
        assert torch.equal(expected, ours)


def test_python_processors_sample_the_processed_law():
    """A processor that forbids odd tokens, with a draft that proposes them."""

    class Even(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 1::2] = float("-inf")
            return scores

    with pytest.warns(UserWarning, match="Even"):
        ours = fastspec.generate(
            TARGET,
            draft=CLONE,
            **picture_inputs(2),
            do_sample=True,
            temperature=0.7,
            max_new_tokens=16,
            logits_processor=[Even()],
            seed=1,
        )
    assert (ours[:, 13:] % 2 == 0).all()


class StopAfter(StoppingCriteria):
    """Stops a sequence once a token has occurred; remembers what it was called with."""

    def __init__(self, token):
        self.token, self.lengths = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return (input_ids[:, 13:] == self.token).any(1)


def test_stopping_criteria_are_judged_after_every_token():
    for seed in range(4):
        inputs = picture_inputs(3, seed=seed)
        plain = TARGET.generate(**inputs, **GREEDY)
        token = int(plain[1, 13 + 5])
        theirs, ours = StopAfter(token), StopAfter(token)
        expected = TARGET.generate(**inputs, **GREEDY, stopping_criteria=[theirs])
        got = fastspec.generate(TARGET, draft=TARGET, gamma=5, **inputs, **GREEDY, stopping_criteria=[ours])
        assert torch.equal(expected, got)
        assert ours.lengths == theirs.lengths


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    # transformers' criterion probes the vocabulary with the word abcdef.
    words = Tokenizer(WordLevel({"abcdef" if i == 0 else f"w{i}": i for i in range(64)}, unk_token="abcdef"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.mark.parametrize("criterion", [MaxLengthCriteria(22), EosTokenCriteria], ids=["length", "end"])
def test_built_in_criteria_of_the_users_own_count_besides_the_configs(criterion):
    inputs = picture_inputs(2)
    plain = TARGET.generate(**inputs, **GREEDY)
    if criterion is EosTokenCriteria:
        criterion = EosTokenCriteria(plain[0, 18:20].tolist())
    expected, ours = both(inputs, **GREEDY, stopping_criteria=[criterion])
    assert torch.equal(expected, ours)
    assert not torch.equal(expected, plain)


def test_stop_strings_end_the_text_where_they_occur(tokenizer):
    inputs = picture_inputs()
    plain = TARGET.generate(**inputs, **GREEDY)
    stop = f"w{int(plain[0, 13 + 4])}"
    arguments = {**GREEDY, "stop_strings": [stop], "tokenizer": tokenizer}
    expected, ours = both(inputs, draft=TARGET, **arguments)
    assert torch.equal(expected, ours)
    assert ours.shape[1] < plain.shape[1]
    loop = fastspec.custom_generate(
        TARGET, stop_strings=[stop], tokenizer=tokenizer, pixel_values=inputs["pixel_values"]
    )
    assert torch.equal(expected, TARGET.generate(**inputs, **GREEDY, custom_generate=loop))
    with pytest.raises(ValueError, match="stop_strings needs tokenizer, got None"):
        fastspec.generate(TARGET, draft=TARGET, **inputs, **GREEDY, stop_strings=[stop])
    with pytest.raises(ValueError, match="stop_strings needs tokenizer, got None"):
        fastspec.custom_generate(TARGET, stop_strings=[stop])


@pytest.mark.parametrize("where", ["the model's generation_config", "the generation_config passed"])
def test_stop_strings_of_a_generation_config_count(where, tokenizer):
    inputs = picture_inputs()
    plain = TARGET.generate(**inputs, **GREEDY)
    stop = f"w{int(plain[0, 13 + 4])}"
    target = noisy_clone(TARGET, noise=0.0)
    arguments = {"tokenizer": tokenizer}
    if where == "the model's generation_config":
        target.generation_config.stop_strings = [stop]
        arguments |= GREEDY
    else:
        arguments["generation_config"] = GenerationConfig(
            **GREEDY, stop_strings=[stop], pad_token_id=0, eos_token_id=2
        )
    expected = target.generate(**inputs, **arguments)
    assert expected.shape[1] < plain.shape[1]
    assert torch.equal(fastspec.generate(target, draft=CLONE, **inputs, **arguments), expected)


def test_max_time_stops():
    ours = fastspec.generate(
        TARGET,
        draft=CLONE,
        **picture_inputs(),
        do_sample=False,
        max_new_tokens=100,
        stopping_criteria=[MaxTimeCriteria(max_time=0.0)],
    )
    assert ours.shape[1] == 14


class Recorder(BaseStreamer):
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(value.tolist())

    def end(self):
        self.calls.append("end")


def test_streamers_get_the_calls_that_transformers_makes():
    for inputs in (picture_inputs(), picture_inputs(3)):
        theirs, ours = Recorder(), Recorder()
        TARGET.generate(**inputs, **GREEDY, streamer=theirs)
        fastspec.generate(TARGET, draft=TARGET, **inputs, **GREEDY, streamer=ours)
        assert ours.calls == theirs.calls


def test_text_streamers(capsys):
    inputs = picture_inputs()
    TARGET.generate(**inputs, **GREEDY, streamer=TextStreamer(WordTokenizer(), skip_prompt=True))
    expected = capsys.readouterr().out
    fastspec.generate(
        TARGET, draft=CLONE, **inputs, **GREEDY, streamer=TextStreamer(WordTokenizer(), skip_prompt=True)
    )
    assert capsys.readouterr().out == expected
    assert expected.count("w") == 24
    streamer = TextIteratorStreamer(WordTokenizer(), skip_prompt=True)
    thread = threading.Thread(
        target=fastspec.generate,
        args=(TARGET,),
        kwargs={"draft": CLONE, **inputs, **GREEDY, "streamer": streamer},
    )
    thread.start()
    assert "".join(streamer) == expected.rstrip("\n")
    thread.join()


def test_a_streamer_that_raises_leaves_the_decoder_usable_and_ends_the_stream():
    class Cancelled(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.calls) == 4:
                raise KeyboardInterrupt

    streamer = Cancelled()
    with pytest.raises(KeyboardInterrupt):
        fastspec.generate(TARGET, draft=CLONE, **picture_inputs(), **GREEDY, streamer=streamer)
    assert streamer.calls[-1] == "end"
    expected, ours = both(picture_inputs(), **GREEDY)
    assert torch.equal(expected, ours)


def test_return_dict_with_scores_and_logits():
    arguments = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.2,
        **GREEDY,
    }
    for kind in ({"gamma": 4}, {"tree": TREE}):
        expected, ours = both(picture_inputs(2), **arguments, **kind)
        assert isinstance(ours, type(expected))
        assert torch.equal(expected.sequences, ours.sequences)
        for name in ("scores", "logits"):
            theirs, mine = getattr(expected, name), getattr(ours, name)
            assert len(theirs) == len(mine)
            torch.testing.assert_close(mine[3], theirs[3], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mine[-1][0], theirs[-1][0], rtol=1e-4, atol=1e-4)
    bare = fastspec.generate(TARGET, draft=CLONE, **picture_inputs(), **GREEDY, return_dict_in_generate=True)
    assert bare.scores is None
    assert bare.logits is None
    record = ours.speculation
    assert record.finish_reasons == (FinishReason.LENGTH, FinishReason.LENGTH)
    assert [len(row) for row in record.drafted] == [24, 24]
    assert sum(record.drafted[0]) == sum(n * c for n, c in enumerate(record.accepted[0]))
    assert sum(record.committed) == 2 * 23
    assert record.acceptance_by_position[0] >= record.acceptance_by_position[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"top_k": 0},
        {"temperature": 0.6, "top_p": 0.8, "top_k": 10},
        {"min_p": 0.1, "temperature": 1.5},
        {"repetition_penalty": 1.8, "top_k": 8},
        {"typical_p": 0.6},
        {"epsilon_cutoff": 0.03, "top_k": 0},
        {"eta_cutoff": 0.1, "top_k": 0, "temperature": 0.8},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:these logits processors run in Python")
def test_sampled_tokens_follow_transformers_processed_law(arguments):
    """The first token, of the prefill, and the second, of a cycle: do_sample brings top-k 50 as in transformers."""
    arguments = {"do_sample": True, "min_new_tokens": 2, **arguments}
    inputs = picture_inputs(8)
    one = {name: value[:1] for name, value in inputs.items()}
    eight = {name: value[:1].expand(8, *value.shape[1:]) for name, value in inputs.items()}

    def processed_laws(**prompts):
        output = TARGET.generate(
            **prompts, **arguments, max_new_tokens=2, output_scores=True, return_dict_in_generate=True
        )
        return output.scores[0].double().softmax(-1)

    first = processed_laws(**one)[0]
    after = {"input_ids": torch.cat([one["input_ids"].expand(64, -1), torch.arange(64)[:, None]], dim=1)}
    after["pixel_values"] = one["pixel_values"].expand(64, -1, -1, -1)
    after["input_ids"][IMAGE_TOKEN_ID, -1] = 0  # a second image would be missing; the law below is not used
    assert first[IMAGE_TOKEN_ID] < 1e-3
    second = processed_laws(**after, attention_mask=torch.ones_like(after["input_ids"]))
    second[IMAGE_TOKEN_ID] = 1 / 64
    joint = first[:, None] * second

    counts = torch.zeros(64, 64, dtype=torch.float64)
    for call in range(50):
        tokens = fastspec.generate(
            TARGET, draft=CLONE, gamma=2, **eight, max_new_tokens=2, seed=8 * call, **arguments
        )
        counts.index_put_((tokens[:, 13], tokens[:, 14]), torch.ones(8, dtype=torch.float64), accumulate=True)
    assert counts[joint == 0].sum() == 0, "a token was said that transformers' processors forbid"
    for observed, law in ((counts.sum(1), joint.sum(1)), (counts.sum(0), joint.sum(0))):
        expected = law * counts.sum()
        large = expected > 5
        statistic = ((observed - expected)[large] ** 2 / expected[large]).sum()
        assert statistic < large.sum() + 5 * (2 * large.sum()) ** 0.5


def test_seeds_generators_and_the_global_seed():
    inputs = picture_inputs(2)
    arguments = {"do_sample": True, "max_new_tokens": 12, "top_k": 0, "draft": CLONE}

    def run(**more):
        return fastspec.generate(TARGET, **inputs, **arguments, **more)

    assert torch.equal(run(seed=5), run(seed=5))
    assert not torch.equal(run(seed=5), run(seed=6))
    assert torch.equal(run(seed=5), run(seed=[5, 6]))
    assert torch.equal(run(seed=5), run(seed=np.int64(5)))
    assert torch.equal(run(seed=5), run(seed=2**64 + 5)), "seeds count modulo 2**64"
    assert not torch.equal(run(seed=5), run(seed=2**63 + 5))
    first = run(generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, run(generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(first, run())
    assert not torch.equal(first, second)


def test_drafter_invariant_text_does_not_depend_on_the_draft():
    inputs = picture_inputs(2)
    arguments = {
        "do_sample": True,
        "max_new_tokens": 20,
        "temperature": 0.9,
        "seed": 11,
        "rule": "drafter_invariant",
    }
    texts = [
        fastspec.generate(TARGET, draft=draft, **inputs, **arguments, **shape)
        for draft in (TEXT, CLONE, TARGET)
        for shape in ({"gamma": 1}, {"gamma": 4}, {"tree": TREE})
    ]
    texts.append(fastspec.generate(TARGET, draft="ngram", gamma=3, **inputs, **arguments))
    for text in texts[1:]:
        assert torch.equal(text, texts[0])


def test_several_return_sequences_with_several_images():
    inputs = picture_inputs(2, images=2)
    ours = fastspec.generate(
        TARGET,
        draft=CLONE,
        **inputs,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=8,
        top_k=1,
        seed=0,
    )
    greedy = TARGET.generate(**inputs, do_sample=False, max_new_tokens=8)
    assert torch.equal(ours, greedy.repeat_interleave(3, dim=0))
    free = fastspec.generate(
        TARGET,
        draft=CLONE,
        **inputs,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=8,
        top_k=0,
        seed=0,
    )
    assert len({tuple(row) for row in free[:3].tolist()}) == 3


@pytest.mark.parametrize("draft", [TEXT, CLONE, "ngram"], ids=["text", "image", "ngram"])
def test_through_transformers_own_door(draft):
    inputs = picture_inputs(2)
    bound = {"pixel_values": inputs["pixel_values"]} if draft is CLONE else {}
    loop = fastspec.custom_generate(draft=draft, gamma=4, **bound)
    expected = TARGET.generate(**inputs, **GREEDY)
    assert torch.equal(expected, TARGET.generate(**inputs, **GREEDY, custom_generate=loop))
    assert torch.equal(expected, TARGET.generate(**inputs, **GREEDY, custom_generate=loop)), (
        "the loop is reusable"
    )
    copies = {"do_sample": True, "top_k": 1, "max_new_tokens": 24, "num_return_sequences": 3}
    repeated = TARGET.generate(**inputs, **copies, custom_generate=loop, return_dict_in_generate=True)
    assert torch.equal(expected.repeat_interleave(3, dim=0), repeated.sequences)
    assert repeated.speculation.target_passes > 0
    with pytest.raises(ValueError, match="num_beams=2 cannot be honoured: beam search is not supported"):
        TARGET.generate(**inputs, num_beams=2, max_new_tokens=4, custom_generate=loop)


def test_decoder_is_reusable_and_streams():
    decoder = SpeculativeDecoder(TARGET, CLONE, gamma=3, batch_size=2, capacity=64)
    for batch in (2, 1, 2):
        inputs = picture_inputs(batch, seed=batch)
        prompts = make_prompts(TARGET, inputs["input_ids"], [0] * batch, dict(inputs))
        tokens = [[] for _ in range(batch)]
        for commitment in decoder.stream(
            [
                Request(prompt, 15, eos_token_ids=(2,), params=SamplingParams(temperature=0.0))
                for prompt in prompts
            ]
        ):
            for row in range(batch):
                tokens[row] += commitment.tokens[row]
        expected = TARGET.generate(**inputs, do_sample=False, max_new_tokens=15)[:, 13:]
        for row in range(batch):
            assert tokens[row] == expected[row, : len(tokens[row])].tolist()


def test_models_are_not_kept_alive():
    target, draft = tiny_llava(seed=9), tiny_llama(seed=9)
    fastspec.generate(target, draft=draft, **picture_inputs(), **GREEDY)
    alive = [weakref.ref(target), weakref.ref(draft)]
    del target, draft
    gc.collect()
    assert [one() for one in alive] == [None, None]


def test_nan_logits_end_that_sequence_marked_and_the_others_go_on():
    inputs = picture_inputs(3)
    expected = TARGET.generate(**inputs, **GREEDY)
    broken = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    broken["pixel_values"][1] = float("nan")
    with pytest.warns(UserWarning, match="sequence 1 ended early: the target's logits were NaN or infinite"):
        output = fastspec.generate(TARGET, draft=CLONE, **broken, **GREEDY, return_dict_in_generate=True)
    reasons = output.speculation.finish_reasons
    assert reasons == (FinishReason.LENGTH, FinishReason.INVALID_LOGITS, FinishReason.LENGTH)
    assert torch.equal(output.sequences[[0, 2]], expected[[0, 2]])
    assert (output.sequences[1, 13:] == 0).all()


def test_nan_in_the_draft_changes_nothing():
    draft = noisy_clone(CLONE, noise=0.0)
    with torch.no_grad():
        draft.lm_head.weight[7] = float("nan")
        draft.lm_head.weight[9] = float("inf")
    expected, ours = both(picture_inputs(2), draft=draft, **GREEDY)
    assert torch.equal(expected, ours)


@pytest.mark.parametrize("vocab_size", [50, 64, 80])
def test_the_drafts_vocabulary_may_be_smaller_or_padded(vocab_size):
    for kind in ({"gamma": 3}, {"tree": TREE}):
        expected, ours = both(picture_inputs(2), draft=tiny_llama(vocab_size), **GREEDY, **kind)
        assert torch.equal(expected, ours)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_on_a_gpu_the_kernels_decide_and_the_text_is_the_same(backend, monkeypatch):
    monkeypatch.setenv("FASTSPEC_BACKEND", backend)
    target, clone, text = (copy.deepcopy(model).cuda() for model in (TARGET, CLONE, TEXT))
    for seed in range(3):
        inputs = picture_inputs(3, seed=seed)
        expected = TARGET.generate(**inputs, **GREEDY)
        for kind in SPECULATION.values():
            for draft in (clone, text):
                on_gpu = {name: value.cuda() for name, value in inputs.items()}
                got = fastspec.generate(target, draft=draft, **on_gpu, **GREEDY, **kind)
                assert torch.equal(expected, got.cpu())
    decoder = SpeculativeDecoder(target, text)
    assert decoder._verifier.backend == backend
    assert decoder.draft.transformer.device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["block", "target_only", "drafter_invariant"])
def test_on_a_gpu_sampling_gives_the_tokens_of_the_cpu(rule):
    """The same counter-based random numbers on both: the same sampled text, but for rounding."""
    target, clone = copy.deepcopy(TARGET).cuda(), copy.deepcopy(CLONE).cuda()
    arguments = {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 20,
        "max_new_tokens": 16,
        "rule": rule,
        "gamma": 3,
    }
    same = 0
    for seed in range(20):
        inputs = picture_inputs(2, seed=seed)
        expected = fastspec.generate(TARGET, draft=CLONE, seed=seed, **inputs, **arguments)
        on_gpu = {name: value.cuda() for name, value in inputs.items()}
        got = fastspec.generate(target, draft=clone, seed=seed, **on_gpu, **arguments).cpu()
        same += got.shape == expected.shape and bool((got == expected).all())
    assert same >= 19
