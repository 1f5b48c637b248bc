"""Image drafts: fewer image tokens by pooling, and a vision tower that runs once for target and draft."""

import copy
import pickle

import pytest
import torch
from models import picture_inputs, tiny_llama, tiny_llava
from transformers import LlavaForConditionalGeneration
from transformers.utils import logging

import fastspec
from fastspec.draft import ImageDraft
from fastspec.draft.pooling import pool, pool_images
from fastspec.draft.sharing import share_vision_tower
from fastspec.generation import make_prompts
from fastspec.training.adapter import add_image_adapter
from fastspec.training.batches import Collator
from fastspec.training.template import Example

logging.disable_progress_bar()


def pair(pooling=1):
    """A target, and a draft with an adapter to its features."""
    target = tiny_llava()
    return target, add_image_adapter(tiny_llama(), target, pooling).eval()


def runs_of(module, monkeypatch):
    """Counts how often a module runs."""
    count = []
    module.register_forward_hook(lambda *_: count.append(1))
    return count


def test_pooling_by_hand():
    features = torch.arange(16.0).view(1, 16, 1)
    assert pool(features, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pool(features, 4).flatten().tolist() == [7.5]
    for places, side in ((16, 3), (12, 2)):
        with pytest.raises(ValueError, match=f"{places} image features cannot be pooled by {side} x {side}"):
            pool(torch.zeros(1, places, 1), side)
    target = tiny_llava()
    target.config.image_seq_length = 4
    with pytest.raises(ValueError, match="4 image features cannot be pooled by 3 x 3"):
        add_image_adapter(tiny_llama(), target, 3)
    with pytest.raises(ValueError, match="image pooling must be at least 1, got 0"):
        add_image_adapter(tiny_llama(), target, 0)


def test_a_pooled_checkpoint_is_that_of_any_llava(tmp_path):
    target = tiny_llava()
    target.config.image_seq_length = 4
    draft = add_image_adapter(tiny_llama(), target, 2).eval()
    draft.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = picture_inputs()
    prompt = make_prompts(target, inputs["input_ids"], [0], {"pixel_values": inputs["pixel_values"]})[0]
    one, two = (ImageDraft(model).prompt_embeddings(prompt) for model in (draft, loaded))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert len(one) == prompt.num_tokens - 4 + 1
    pool_images(loaded)  # again: nothing is pooled twice
    tower = draft.model.vision_tower(inputs["pixel_values"]).last_hidden_state[:, 1:]
    projector = draft.model.multi_modal_projector
    mean = projector.linear_2(projector.act(projector.linear_1(tower.mean(1, keepdim=True))))[0]
    torch.testing.assert_close(ImageDraft(loaded).prompt_embeddings(prompt)[1:2], mean, rtol=1e-5, atol=1e-6)

    plain = target.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(
        fastspec.generate(target, draft=loaded, **inputs, max_new_tokens=8, do_sample=False), plain
    )


def test_rows_of_a_pooled_draft_have_a_placeholder_for_each_square():
    class Processor:
        def __call__(self, text, images, **_):
            ids = torch.tensor([[1, 3, 3, 3, 3, 9, 3, 3, 3, 3, 8]])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.zeros(2)}

    example = Example((1, 3, 9, 3, 8, 5, 2), (False,) * 5 + (True,) * 2, "x", 5, ("a", "b"))
    collator = Collator(Processor(), 3, 0, with_target=True, draft_sees_images=True, image_pooling=2)
    batch = collator([(example, [None, None])])
    assert batch["target"]["input_ids"].tolist() == [[1, 3, 3, 3, 3, 9, 3, 3, 3, 3, 8, 5, 2]]
    assert batch["input_ids"].tolist() == [[1, 3, 9, 3, 8, 5, 2]]
    assert batch["labels"].tolist() == [[-100] * 5 + [5, 2]]


@pytest.mark.parametrize("pooling", [1, 2])
def test_the_tower_runs_once_for_both(pooling, monkeypatch):
    target = tiny_llava()
    target.config.image_seq_length = 4
    draft = add_image_adapter(tiny_llama(), target, pooling).eval()
    alone = copy.deepcopy(draft)
    inputs = picture_inputs(batch=2, images=2)
    prompts = make_prompts(target, inputs["input_ids"], [0, 0], {"pixel_values": inputs["pixel_values"]})
    expected = [ImageDraft(alone).prompt_embeddings(prompt) for prompt in prompts]

    own = runs_of(draft.model.vision_tower, monkeypatch)
    shared = runs_of(target.model.vision_tower, monkeypatch)
    text = fastspec.generate(target, draft=draft, **inputs, max_new_tokens=6, do_sample=False)
    assert (len(shared), len(own)) == (1, 0)
    assert draft.model.vision_tower is target.model.vision_tower
    assert torch.equal(text, target.generate(**inputs, max_new_tokens=6, do_sample=False))
    shared.clear()
    prompts = make_prompts(target, inputs["input_ids"], [0, 0], {"pixel_values": inputs["pixel_values"]})
    for prompt, embeddings in zip(prompts, expected, strict=True):
        assert torch.equal(ImageDraft(draft).prompt_embeddings(prompt), embeddings)
    assert len(shared) == 1
    with torch.no_grad():
        list(target.model.vision_tower.parameters())[1].add_(0.1)
    assert not torch.equal(ImageDraft(draft).prompt_embeddings(prompts[1]), expected[1])
    assert len(shared) == 2


def test_what_the_tower_saw_before_is_not_taken_for_another_image(monkeypatch):
    target, draft = pair()
    assert share_vision_tower(target, draft)
    inputs, others = picture_inputs(), picture_inputs(seed=1)
    prompt = make_prompts(target, inputs["input_ids"], [0], {"pixel_values": inputs["pixel_values"]})[0]
    runs = runs_of(target.model.vision_tower, monkeypatch)
    before = ImageDraft(draft).prompt_embeddings(prompt)
    assert runs == []
    inputs["pixel_values"].copy_(others["pixel_values"])  # the same memory, another image
    after = ImageDraft(draft).prompt_embeddings(prompt)
    assert len(runs) == 1
    assert not torch.equal(before, after)
    assert torch.equal(ImageDraft(draft).prompt_embeddings(prompt), after)
    assert len(runs) == 1


def test_a_model_with_a_shared_tower_can_be_copied():
    target, draft = pair()
    inputs = picture_inputs()
    text = fastspec.generate(target, draft=draft, **inputs, max_new_tokens=4, do_sample=False)
    twin = copy.deepcopy(target)
    assert twin.model.vision_tower.shared is not target.model.vision_tower.shared
    assert torch.equal(
        fastspec.generate(twin, draft=draft, **inputs, max_new_tokens=4, do_sample=False), text
    )
    pickle.dumps(target.model.vision_tower.shared)


def test_towers_that_differ_are_not_shared():
    target, draft = pair()
    with torch.no_grad():
        list(draft.model.vision_tower.parameters())[-1].add_(1e-3)
    assert not share_vision_tower(target, draft)
    assert draft.model.vision_tower is not target.model.vision_tower
    target, draft = pair()
    assert not share_vision_tower(target, draft.bfloat16())
    target, draft = pair()
    draft.config.vision_feature_layer = -2
    assert not share_vision_tower(target, draft)


@pytest.mark.gpu
@pytest.mark.parametrize("pooling", [1, 2])
def test_an_image_draft_on_a_gpu_gives_the_text_of_the_cpu(pooling):
    target, draft = pair()
    if pooling > 1:
        target.config.image_seq_length = 4
        draft = add_image_adapter(tiny_llama(), target, pooling).eval()
    inputs = picture_inputs()
    arguments = {"max_new_tokens": 20, "do_sample": False}
    expected = fastspec.generate(target, draft=draft, **inputs, **arguments)
    on_gpu = {name: value.cuda() for name, value in inputs.items()}
    target, draft = copy.deepcopy(target).cuda(), copy.deepcopy(draft).cuda()
    for _ in range(3):  # the encoder is captured from the second time on
        got = fastspec.generate(target, draft=draft, **on_gpu, **arguments)
        assert torch.equal(got.cpu(), expected)
