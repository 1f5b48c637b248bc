"""Compact drafts: fewer tokens to propose and weights in 8 bits change what is accepted, never what is said."""

import json
import weakref
from collections import Counter

import pytest
import torch
from enumeration import joint_law_of_rule, joint_law_of_target, random_laws
from models import picture_inputs, tiny_llama, tiny_llava
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import fastspec
from fastspec import DraftTree, miniature
from fastspec.draft import CompactDraft, CompactLlamaForCausalLM, make_draft
from fastspec.draft.int8 import Int8Linear, Int8Weight, round_to_int8
from fastspec.evaluation import fingerprint
from fastspec.lines import BadLines, DataError
from fastspec.training.losses import expected_acceptance
from fastspec.training.shrink import count_tokens, most_frequent
from fastspec.verification import Rule

needs_weights = pytest.mark.skipif(
    not miniature.WEIGHTS.exists(),
    reason="the weights are absent; `python -m fastspec.miniature.train` makes them",
)
logging.disable_progress_bar()


def answer(*token_ids):
    said = {"from": "gpt", "value": "x", "token_ids": token_ids}
    return json.dumps({"conversations": [{"from": "human", "value": "What?"}, said]}) + "\n"


@pytest.fixture
def answers(tmp_path):
    """Answers of held-out captions by the miniature's own words."""
    path = tmp_path / "answers.jsonl"
    tokenizer = miniature.load_processor().tokenizer
    texts = [miniature.sample_example("caption", seed).turns[0][1] for seed in range(60)]
    rows = (tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in texts)
    path.write_text("".join(answer(*row, 2) for row in rows))
    return path


def test_int8_weights_are_the_nearest():
    weight = torch.tensor([[1.0, -2.54, 0.016], [0.0, 0.0, 0.0]])
    codes, scale = round_to_int8(weight)
    assert codes.tolist() == [[50, -127, 1], [0, 0, 0]]
    assert scale[0].item() == pytest.approx(0.02)
    torch.manual_seed(0)
    weight = torch.randn(70, 48)
    codes, scale = round_to_int8(weight)
    assert ((codes * scale[:, None] - weight).abs() <= scale[:, None] * 0.501).all()
    with pytest.raises(ValueError, match="NaN or infinite"):
        round_to_int8(torch.tensor([[1.0, float("inf")]]))


@pytest.mark.parametrize("rows", [(3,), (2, 5)])
def test_the_int8_product_is_that_of_the_dequantised_weights(rows):
    torch.manual_seed(0)
    layers = []
    for outputs in (32, 16):
        layers.append(Int8Linear(48, outputs))
        layers[-1].codes, layers[-1].scale = round_to_int8(torch.randn(outputs, 48))
    weight, bias = Int8Weight.stack(layers, torch.bfloat16), torch.randn(48).bfloat16()
    inputs = torch.randn(*rows, 48).bfloat16()
    exact = torch.cat([layer.dequantised().weight for layer in layers]).double()
    expected = inputs.double() @ exact.T + bias.double()
    found = torch.nn.functional.linear(inputs, weight, bias)
    assert found.shape == expected.shape
    assert type(found) is torch.Tensor
    # Products of bfloat16 codes and scales: two roundings of 2**-9 more than the exact sum.
    torch.testing.assert_close(found.double(), expected, rtol=2**-6, atol=2**-5)
    assert weight.numel() * weight.element_size() == 48 * 48


@pytest.mark.parametrize("bits", [8, 16])
def test_a_compact_checkpoint_has_the_kept_rows_alone(tmp_path, bits):
    draft, kept = tiny_llama(), torch.tensor([2, 5, 6, 40])
    CompactLlamaForCausalLM.of(draft, kept, bits).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, CompactLlamaForCausalLM)
    weights = loaded.lm_head.projection.codes if bits == 8 else loaded.lm_head.projection.weight
    assert weights.shape == (4, 16)
    assert weights.dtype == (torch.int8 if bits == 8 else torch.float32)
    assert isinstance(make_draft(loaded), CompactDraft)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        ours, theirs = loaded(ids).logits, draft(ids).logits
    assert ours.shape == theirs.shape
    lacking = torch.ones(64, dtype=torch.bool)
    lacking[kept] = False
    assert (ours[..., lacking] == float("-inf")).all()
    assert (ours.softmax(-1)[..., lacking] == 0).all()
    difference = (ours - theirs)[..., kept].abs().max() / theirs.abs().max()
    assert difference < 1e-6 if bits == 16 else 1e-6 < difference < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 16])
def test_decoding_computes_what_transformers_does(bits, dtype):
    compact = CompactLlamaForCausalLM.of(tiny_llama(), torch.tensor([2, 5, 6, 40]), bits).to(dtype)
    transformer = CompactDraft(compact)._kept
    packed = isinstance(transformer.lm_head, Int8Weight)
    assert packed == (bits == 8 and dtype is torch.bfloat16)
    ids = torch.arange(3, 20)
    cache = transformer.new_cache(1, 20)
    with torch.no_grad():
        ours = transformer.logits(transformer.prefill(transformer.embed(ids), cache, 0))
        theirs = compact(ids[None]).logits[0][:, [2, 5, 6, 40]]
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=8 * ulp, atol=64 * ulp)
    plain = CompactDraft(CompactLlamaForCausalLM.of(tiny_llama(), torch.arange(64), 16).to(dtype))
    assert transformer.num_bytes < plain.num_bytes
    assert (transformer.vocab_size, CompactDraft(compact).transformer.vocab_size) == (4, 64)


@pytest.mark.parametrize("rule", [Rule.TOKEN_LEVEL, Rule.BLOCK, Rule.RECURSIVE_REJECTION, Rule.TRAVERSAL])
def test_the_law_is_the_targets_where_the_draft_lacks_tokens(rule):
    generator = torch.Generator().manual_seed(0)
    tree = DraftTree.chain(2) if rule in (Rule.TOKEN_LEVEL, Rule.BLOCK) else DraftTree.kary((2, 1))
    p = random_laws(4, 3, generator, "dense")
    q = random_laws(4, 3, generator, "dense")
    for prefix, law in q.items():
        law[[0, 3]] = 0.0
        q[prefix] = law / law.sum()
    found = joint_law_of_rule(rule, tree, p, q)
    assert (found - joint_law_of_target(p, 4, tree.max_depth + 1)).abs().max() < 1e-12


@needs_weights
@pytest.mark.parametrize("bits", [8, 16])
def test_texts_stay_the_same_and_acceptance_falls_with_the_vocabulary(bits):
    target, draft, processor = miniature.load_target(), miniature.load_draft(), miniature.load_processor()
    frequent = Counter()
    for seed in range(40):
        text = miniature.sample_example("caption", 1000 + seed).turns[0][1]
        frequent.update(processor.tokenizer(f" {text}", add_special_tokens=False)["input_ids"])
    image, text = miniature.prompts(1)[0]
    inputs = processor(images=image, text=text, return_tensors="pt")
    asked = {**inputs, "max_new_tokens": 24, "return_dict_in_generate": True}
    plain = target.generate(**asked, do_sample=False).sequences
    sampled = fastspec.generate(
        target, draft=draft, rule="drafter_invariant", seed=3, **asked, do_sample=True
    )
    efficiency = {}
    for size in (1024, 128, 16):
        kept = torch.tensor(most_frequent(frequent, size, 1024, [2]))
        compact = CompactLlamaForCausalLM.of(draft, kept, bits)
        for shape in ({"gamma": 4}, {"tree": DraftTree.kary((2, 2))}):
            output = fastspec.generate(target, draft=compact, **shape, **asked, do_sample=False)
            assert torch.equal(output.sequences, plain)
        efficiency[size] = output.speculation.block_efficiency
        # The same text for every draft: only the number of passes can tell which it was.
        again = fastspec.generate(
            target, draft=compact, rule="drafter_invariant", seed=3, **asked, do_sample=True
        )
        assert torch.equal(again.sequences, sampled.sequences)
    assert efficiency[1024] >= efficiency[128] > efficiency[16] >= 1


def test_weights_are_dequantised_once_for_all_decoders(monkeypatch):
    compact, made = CompactLlamaForCausalLM.of(tiny_llama(), torch.arange(64), 8), []
    dequantised = Int8Linear.dequantised
    monkeypatch.setattr(Int8Linear, "dequantised", lambda self: made.append(self) or dequantised(self))
    target, count = tiny_llava(), sum(isinstance(module, Int8Linear) for module in compact.modules())
    for gamma in (2, 2, 3):  # a decoder is made, found again, and another is made
        fastspec.generate(target, draft=compact, gamma=gamma, **picture_inputs(), max_new_tokens=4)
    assert len(made) == len(set(made)) == count
    compact.model.layers[0].mlp.down_proj.codes[0, 0] += 1
    assert CompactDraft(compact)._kept is not CompactDraft(compact.to(torch.float64))._kept
    assert len(made) == 3 * count
    # Nothing is kept for a draft that is out of use.
    fastspec.clear_decoders()
    transformer = weakref.ref(CompactDraft(compact)._kept)
    assert transformer() is None


@needs_weights
def test_int8_weights_cost_little_acceptance():
    target, draft, processor = miniature.load_target(), miniature.load_draft(), miniature.load_processor()
    compact = CompactLlamaForCausalLM.of(draft, torch.arange(1024), 8)
    example = miniature.sample_example("caption", 0)
    inputs = miniature.prepare(processor, example.scene.render(), example.turns[0][0])
    said = processor.tokenizer(f" {example.turns[0][1]}", return_tensors="pt", add_special_tokens=False)[
        "input_ids"
    ]
    with torch.no_grad():
        full = torch.cat([inputs["input_ids"], said], 1)
        p = target(input_ids=full, pixel_values=inputs["pixel_values"]).logits[0, -len(said[0]) - 1 : -1]
        text = full[:, full[0] != target.config.image_token_id]
        before, after = (
            expected_acceptance(model(text).logits[0, -len(said[0]) - 1 : -1], p).mean()
            for model in (draft, compact)
        )
    assert before > 0.3
    assert abs(before - after) < 0.02


def test_int8_weights_tell_checkpoints_apart():
    one, other = (CompactLlamaForCausalLM.of(tiny_llama(), torch.arange(64), 8) for _ in range(2))
    assert fingerprint(one) == fingerprint(other)
    other.model.layers[0].mlp.down_proj.codes[0, 0] += 1
    assert fingerprint(one) != fingerprint(other)


def test_the_most_frequent_tokens_are_kept(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(answer(5, 5, 7, 2) + answer(7, 9, 5, 2))
    counts = count_tokens([path], 12, BadLines())
    assert counts == {5: 3, 7: 2, 2: 2, 9: 1}
    assert most_frequent(counts, 3, 12, [2]) == [2, 5, 7]
    assert most_frequent(counts, 6, 12, [11]) == [0, 2, 5, 7, 9, 11]  # equals by their number
    with pytest.raises(ValueError, match="must be 2 to 12, the draft's vocabulary, got 13"):
        most_frequent(counts, 13, 12, [2])
    path.write_text(answer(5) + answer(12) + "{}\n")
    with pytest.raises(DataError, match=r"line 2: token id 12 is outside the draft's vocabulary of 12"):
        count_tokens([path], 12, BadLines())
    bad = BadLines(skip=True)
    assert count_tokens([path], 12, bad) == {5: 1}
    assert len(bad) == 2
    path.write_text(
        json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    )
    with pytest.raises(DataError, match="line 1: the answer has no 'token_ids'"):
        count_tokens([path], 12, BadLines())


@needs_weights
def test_the_command(run, answers, tmp_path):
    out = tmp_path / "small"
    asked = ("shrink-draft", "--draft", "miniature", "--out", out)
    status, printed, notes = run(*asked, "--vocabulary", 200, "--answers", answers, "--weights", "int8")
    assert (status, notes) == (0, "")
    assert "small: 200 of 1024 tokens, " in printed
    assert "of the answers; weights int8" in printed
    facts = json.loads((out / "shrinking.json").read_text())["result"]
    assert 0.8 < facts["coverage"] < 1
    assert 2 in AutoModelForCausalLM.from_pretrained(out).lm_head.kept_ids
    status, printed, _ = run("evaluate", "--target", "miniature", "--draft", out, "miniature", "--task",
                             "miniature:caption", "--limit", 1, "--max-new-tokens", 8)  # fmt: skip
    assert status == 0
    assert "NOT identical" not in printed

    for arguments, message in (
        (asked, "nothing to shrink: pass --vocabulary, --weights int8, or both"),
        ((*asked, "--vocabulary", 20), "--vocabulary and --answers belong together"),
        ((*asked, "--vocabulary", 1, "--answers", answers), "--vocabulary must be 2 to 1024"),
        ((*asked, "--weights", "int4"), "weights must be int8 or full, got 'int4'"),
        ((*asked, "--vocabulary", 20, "--answers", "no.jsonl"), "file not found: no.jsonl"),
        (("shrink-draft", "--draft", "ngram", "--out", out, "--weights", "int8"), "'ngram' has no weights"),
        (("shrink-draft", "--draft", out, "--out", out, "--weights", "int8"), "only a text-only LLaMA draft can"),
    ):  # fmt: skip
        status, _, notes = run(*arguments)
        assert status == 2
        assert message in notes, notes


def test_a_compact_draft_of_another_vocabulary_is_refused():
    compact = CompactLlamaForCausalLM.of(tiny_llama(vocab_size=1000), torch.arange(8), 16)
    with pytest.raises(ValueError, match="the draft's vocabulary has 1000 tokens and the target's 64"):
        fastspec.generate(tiny_llava(), draft=compact, **picture_inputs(), max_new_tokens=2)
