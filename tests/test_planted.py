"""Planted models have the law that they say, and the acceptance that was asked for."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from bench import planted
from bench.law import PROBABILITIES, PlantedLaw
from bench.planted import planted_pair
from fastspec.decoder import Request, SpeculativeDecoder
from fastspec.model.vision import Prompt
from fastspec.sampling import SamplingParams

AGREEMENTS = (0.0, 0.25, 0.5, 0.8, 1.0)
#: Total variation between a model's law and the one stated: the small shapes have the noisiest layers.
TOLERANCE = 0.04


def small_pair(agreement, dtype=torch.float32):
    return planted_pair("small", agreement=agreement, device="cpu", dtype=dtype)


def of_each_class(law):
    """One token of each class, ``[K]``."""
    return torch.stack([(law.class_of == number).nonzero()[-1, 0] for number in range(law.num_classes)])


@torch.no_grad()
def laws(model, tokens):
    """What a model says follows each token, alone and in a text of all the others."""
    return [
        model(input_ids=tokens[:, None]).logits[:, 0].double().softmax(-1),
        model(input_ids=tokens[None]).logits[0].double().softmax(-1),
    ]


@pytest.mark.parametrize("agreement", AGREEMENTS)
def test_acceptance_and_greedy_matches_of_the_law_are_the_agreement(agreement):
    law = PlantedLaw(1000, 40, agreement, num_text_tokens=900)
    tokens = of_each_class(law)
    p, q = law.rows(tokens), law.rows(tokens, draft=True)
    for each in (p, q):
        torch.testing.assert_close(each.sum(1), torch.ones(40, dtype=torch.float64))
        largest = each.topk(2).values
        assert (largest[:, 0] >= 1.99 * largest[:, 1]).all()
    assert torch.minimum(p, q).sum(1).mean().item() == pytest.approx(agreement)
    assert (p.argmax(1) == q.argmax(1)).double().mean().item() == pytest.approx(agreement)


def test_agreement_is_rounded_to_classes():
    law = PlantedLaw(1000, 7, 0.5, num_text_tokens=900)
    assert law.agreement == 4 / 7
    tokens = of_each_class(law)
    overlap = torch.minimum(law.rows(tokens), law.rows(tokens, draft=True)).sum(1).mean()
    assert overlap.item() == pytest.approx(4 / 7)


def test_successors_are_text_and_lead_through_all_classes():
    law = PlantedLaw(1000, 40, 0.5, num_text_tokens=900, seed=3)
    assert law.after(17) == dict(
        zip(law.successors[law.class_of[17], :4].tolist(), PROBABILITIES, strict=True)
    )
    assert len(law.after(17, draft=True)) == 8
    assert law.successors.unique().numel() == law.successors.numel()
    assert law.successors.min() >= 3
    assert law.successors.max() < 903
    for slot in range(8):  # every class follows every other equally often
        assert law.class_of[law.successors[:, slot]].unique().numel() == 40
    seen, token = set(), 17
    for _ in range(40):
        token = law.successors[law.class_of[token], 0]
        seen.add(token.item())
    assert len(seen) == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("agreement", [0.0, 0.8, 1.0])
def test_models_have_the_law(agreement, dtype):
    target, draft, law = small_pair(agreement, dtype)
    tokens = of_each_class(law)
    for p, q in zip(laws(target, tokens), laws(draft, tokens), strict=True):
        for model, stated in ((p, law.rows(tokens)), (q, law.rows(tokens, draft=True))):
            assert ((model - stated).abs().sum(1) / 2).max() < TOLERANCE
        assert torch.minimum(p, q).sum(1).mean().item() == pytest.approx(law.agreement, abs=0.02)
        assert (p.argmax(1) == q.argmax(1)).double().mean().item() == law.agreement


def test_layers_change_hidden_states_a_little():
    target, _, _ = small_pair(0.5)
    text = target.model.language_model
    with torch.no_grad():
        states = text(torch.arange(3, 43)[None], output_hidden_states=True).hidden_states
    before = states[0]
    after = text.layers[-1](states[-2], position_embeddings=text.rotary_emb(before, torch.arange(40)[None]))
    change = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert change.min() > 0.01
    assert change.max() < 0.15


def test_embeddings_of_different_classes_are_nearly_orthogonal():
    target, draft, law = small_pair(0.5)
    tokens = of_each_class(law)
    for model in (target, draft):
        rows = torch.nn.functional.normalize(model.get_input_embeddings().weight[tokens], dim=1)
        cosines = (rows @ rows.T)[~torch.eye(len(rows), dtype=torch.bool)]
        assert cosines.mean().item() == pytest.approx(planted.COMMON**2, abs=0.01)
        assert cosines.abs().max() < 0.35


@pytest.mark.parametrize(("agreement", "efficiency"), [(0.0, 1), (1.0, 4)])
def test_a_chain_of_three_is_never_or_always_accepted(agreement, efficiency):
    target, draft, law = small_pair(agreement)
    prompt = Prompt(torch.tensor([1, 30, 40]))
    decoder = SpeculativeDecoder(target, draft, gamma=3, capacity=64)
    request = Request(prompt, 41, SamplingParams(temperature=0.0), eos_token_ids=(2,))
    tokens = [token for commitment in decoder.stream([request]) for token in commitment.tokens[0]]
    assert decoder.record().block_efficiency == efficiency
    expected = 40
    for token in tokens:
        expected = max(law.after(expected), key=law.after(expected).get)
        assert token == expected


def test_sampled_chains_are_accepted_as_often_as_said():
    target, draft, law = small_pair(0.5)
    decoder = SpeculativeDecoder(target, draft, gamma=1, batch_size=8, capacity=128)
    requests = [Request(Prompt(torch.tensor([1, 30 + row])), 120, seed=row) for row in range(8)]
    for _ in decoder.stream(requests):
        pass
    record = decoder.record()
    deviation = (0.25 / record.target_passes) ** 0.5
    assert record.mean_accepted == pytest.approx(law.agreement, abs=4 * deviation)


def test_what_is_written_loads_with_from_pretrained(tmp_path):
    planted.main(
        ["--out", str(tmp_path), "--agreement", "0.25", "--target", "small", "--device", "cpu", "--seed", "5"]
    )
    made = planted_pair("small", agreement=0.25, device="cpu", seed=5)
    kinds = (AutoModelForImageTextToText, AutoModelForCausalLM)
    for name, kind, model in zip(("target", "draft"), kinds, made[:2], strict=True):
        loaded = kind.from_pretrained(tmp_path / name, dtype="auto")
        assert loaded.dtype == torch.bfloat16
        assert loaded.generation_config.eos_token_id == 2
        for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
            assert torch.equal(one, other)

    processor = AutoProcessor.from_pretrained(tmp_path / "target")
    picture = Image.new("RGB", (40, 30), "red")
    inputs = processor(images=picture, text="<image> t17 t18", return_tensors="pt")
    image = made[0].config.image_token_id
    assert inputs["input_ids"][0].tolist() == [1, image, image, image, image, 17, 18]
    target = kinds[0].from_pretrained(tmp_path / "target", dtype=torch.float32)
    output = target.generate(**inputs, max_new_tokens=3, do_sample=False)[0, -3:].tolist()
    assert output[0] == max(made[2].after(18), key=made[2].after(18).get)
    assert processor.decode(output) == " ".join(f"t{token}" for token in output)


def test_the_target_does_not_depend_on_the_agreement():
    one, other = small_pair(0.0)[0], small_pair(1.0)[0]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"agreement": 1.1}, r"agreement must be in \[0, 1\], got 1.1"),
        ({"agreement": float("nan")}, r"agreement must be in \[0, 1\], got nan"),
        ({"target": "llava70b"}, "target must be llava7b or small, got 'llava70b'"),
        ({"target": "small", "draft": "tiny"}, "draft must be 115m or small, got 'tiny'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        planted_pair(**arguments, device="cpu")
