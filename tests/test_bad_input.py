"""Bad input gets an error that names what was expected and what came, before any work."""

import random
import struct
import zlib

import numpy as np
import pytest
import torch
from models import (
    IMAGE_SIZE,
    IMAGE_TOKEN_ID,
    left_padded,
    noisy_clone,
    picture_inputs,
    tiny_llama,
    tiny_llava,
)
from PIL import Image
from transformers import (
    CLIPVisionModel,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StoppingCriteria,
    StoppingCriteriaList,
)

import fastspec
from fastspec import DraftTree, SpeculativeDecoder
from fastspec.draft import NgramDraft
from fastspec.images import load_image
from fastspec.model.transformer import DecodeTransformer

TARGET = tiny_llava()
TEXT = tiny_llama()
CLONE = noisy_clone(TARGET)


def refused(error, message, target=TARGET, draft=TEXT, inputs=None, sees=False, **arguments):
    """The call raises, before a language model has run and, unless it ``sees``, a vision tower."""

    def work(*_, **__):
        pytest.fail("work was done")

    inputs = picture_inputs() if inputs is None else inputs
    arguments.setdefault("max_new_tokens", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeTransformer, "_run", work)
        if not sees:
            patch.setattr(CLIPVisionModel, "forward", work)
        with pytest.raises(error, match=message):
            fastspec.generate(target, draft=draft, **inputs, **arguments)


def test_no_draft_or_the_wrong_kind_of_model():
    refused(
        TypeError, r"draft must be a causal language model of transformers.*or 'ngram', got none", draft=None
    )
    refused(TypeError, "got 'lookup'", draft="lookup")
    refused(TypeError, "got Linear", draft=torch.nn.Linear(2, 2))
    refused(TypeError, "got ndarray", draft=np.zeros(2))
    refused(
        TypeError,
        r"target must be a LLaVA-shaped model \(llava, .*\), got LlamaForCausalLM \(model_type 'llama'\)",
        target=TEXT,
    )
    refused(TypeError, "target must be a LLaVA-shaped model .*, got str", target="llava-hf/llava-1.5-7b-hf")
    with pytest.raises(TypeError, match="got NoneType"):
        SpeculativeDecoder(None, TEXT)
    with pytest.raises(TypeError, match=r"target must be a LLaVA-shaped model .*, got LlamaForCausalLM"):
        TEXT.generate(
            torch.tensor([[1, 5]]), max_new_tokens=2, custom_generate=fastspec.custom_generate(TEXT)
        )
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    refused(ValueError, "unsupported text model 'gpt2'; supported: llama, mistral, qwen2", draft=gpt2)


def test_models_with_other_positions_are_refused_by_name():
    target = tiny_llava()
    target.config.model_type = "qwen2_vl"
    refused(TypeError, r"model_type 'qwen2_vl'", target=target)


def test_vocabularies_that_disagree():
    refused(
        ValueError,
        r"the draft's vocabulary has 1064 tokens and the target's 64; .*tokenizer and draft_tokenizer",
        draft=tiny_llama(1064),
    )

    class Tokenizer:
        def __init__(self, words, added=()):
            self.vocab = {word: index for index, word in enumerate(words)}
            self.added = {word: self.vocab[word] for word in added}

        def get_vocab(self):
            return self.vocab

        def get_added_vocab(self):
            return self.added

    words = [f"w{index}" for index in range(64)]
    same = {
        "tokenizer": Tokenizer(words),
        "draft_tokenizer": Tokenizer([*words, "<extra>"], added=["<extra>"]),
    }
    fastspec.generate(TARGET, draft=tiny_llama(1064), **picture_inputs(), max_new_tokens=2, **same)
    swapped = [words[1], words[0], *words[2:]]
    refused(
        ValueError,
        r"disagree on 2 tokens, for example 'w1': id 1 in the target's, 0 in the draft's",
        tokenizer=Tokenizer(words),
        draft_tokenizer=Tokenizer(swapped),
    )
    # A decoder that is kept has been compared with other tokenizers, or with none.
    TARGET.generate(**picture_inputs(), max_new_tokens=2, custom_generate=fastspec.custom_generate(TEXT))
    disagreeing = fastspec.custom_generate(
        TEXT, tokenizer=Tokenizer(words), draft_tokenizer=Tokenizer(swapped)
    )
    with pytest.raises(ValueError, match="disagree on 2 tokens"):
        TARGET.generate(**picture_inputs(), max_new_tokens=2, custom_generate=disagreeing)


def test_tokenizers_that_are_none():
    refused(
        TypeError,
        "expected a tokenizer or processor of transformers, got str",
        tokenizer="llama",
        draft_tokenizer="llama",
    )


def test_prompt_and_new_tokens_over_the_capacity():
    refused(
        ValueError,
        "prompt and new tokens need 313 positions, but the target's max_position_embeddings is 256",
        max_new_tokens=300,
    )
    decoder = SpeculativeDecoder(TARGET, TEXT, capacity=20)
    from fastspec.decoder import Request
    from fastspec.model.vision import Prompt

    with pytest.raises(
        ValueError, match="prompt 0 has 12 tokens and asks for 9 new ones, 21 in all, but the capacity is 20"
    ):
        decoder.prefill([Request(Prompt(torch.arange(12)), 9)])
    with pytest.raises(
        ValueError, match="capacity must be 2 to 256, the target's max_position_embeddings, got 300"
    ):
        SpeculativeDecoder(TARGET, TEXT, capacity=300)
    with pytest.raises(ValueError, match=r"expected 1 to 1 requests \(the decoder's batch_size\), got 2"):
        decoder.prefill([Request(Prompt(torch.arange(3)), 1)] * 2)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        decoder.prefill([Request(Prompt(torch.arange(3)), 0)])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        decoder.prefill([Request(Prompt(torch.arange(0)), 1)])
    with pytest.raises(ValueError, match="batch_size must be 1 to 8, got 9"):
        SpeculativeDecoder(TARGET, TEXT, batch_size=9)


def test_a_prompt_whose_images_do_not_fill_its_placeholders():
    from fastspec.model.vision import Prompt

    ids = torch.tensor([1, 63, 63, 5])
    for rows, found in ((), 0), ((1,), 1), ((2, 1), 3):
        images = tuple(torch.zeros(count, 8) for count in rows)
        message = rf"2 image placeholders \(id 63\), but its images have {found} features"
        with pytest.raises(ValueError, match=message):
            Prompt(ids, 63, images)
    assert Prompt(ids, 63, (torch.zeros(2, 8),)).text_ids.tolist() == [1, 5]
    with pytest.raises(ValueError, match="0 image placeholders"):
        Prompt(ids, images=(torch.zeros(2, 8),))


def test_images_and_placeholders_that_do_not_match():
    inputs = picture_inputs()
    without = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    refused(ValueError, "prompt 0 has 4 image placeholders but no pixel_values were passed", inputs=without)
    two = {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
    refused(ValueError, "2 images were passed but the prompts have placeholders for 1", inputs=two, sees=True)
    ids = inputs["input_ids"].clone()
    ids[0, 4] = 9
    refused(
        ValueError,
        r"prompt 0 has 3 image placeholders, which its images do not fill: 1 images .* with \[4\] features each",
        inputs={**inputs, "input_ids": ids},
        sees=True,
    )


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (
            torch.zeros(1, 3, 8, 8),
            ValueError,
            r"pixel_values must have shape \[images, 3, 16, 16\], got \[1, 3, 8, 8\]",
        ),
        (torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE), ValueError, r"got \[3, 16, 16\]"),
        (torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE), ValueError, r"got \[1, 1, 16, 16\]"),
        (
            torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8),
            TypeError,
            "floating-point tensor, got a torch.uint8 tensor",
        ),
        ([[0.0]], TypeError, "floating-point tensor, got list"),
    ],
    ids=["size", "rank", "channels", "integers", "a list"],
)
def test_pixel_values_of_the_wrong_shape(pixels, error, message):
    refused(error, message, inputs={**picture_inputs(), "pixel_values": pixels})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 0}, "gamma must be an integer from 1 to 127, got 0"),
        ({"gamma": 300}, "gamma must be an integer from 1 to 127, got 300"),
        ({"gamma": -3}, "gamma must be an integer from 1 to 127, got -3"),
        ({"gamma": 2.5}, "gamma must be an integer from 1 to 127, got 2.5"),
        ({"gamma": 2, "tree": DraftTree.chain(2)}, "pass gamma or tree, not both"),
        ({"tree": DraftTree.chain(0)}, "at least one node besides its root"),
        ({"rule": "lossy"}, "unknown rule 'lossy'; expected one of 'token_level', 'block'"),
        (
            {"rule": "block", "tree": DraftTree.kary((2,))},
            "rule 'block' needs a chain, got a tree of 3 nodes with siblings; use 'traversal'",
        ),
        (
            {"draft": "ngram", "rule": "block"},
            "rule 'block' needs the law the draft sampled from, and this draft has none",
        ),
        (
            {"draft": "ngram", "tree": DraftTree.kary((2,))},
            "this draft proposes a chain, got a tree of 3 nodes",
        ),
        ({"seed": [1, 2]}, "seed must be an integer or a list of 1 integers, got 2"),
    ],
    ids=str,
)
def test_speculation_arguments(arguments, message):
    refused(ValueError, message, **arguments)


@pytest.mark.parametrize("seed", [1.5, "seven", ["a"], [1.0]], ids=repr)
def test_seeds_of_the_wrong_type(seed):
    refused(TypeError, "seed must be an integer or a list of integers, got", seed=seed)


def test_tree_and_ngram_of_the_wrong_type():
    refused(TypeError, "tree must be a fastspec.DraftTree, got list", tree=[[1], []])
    with pytest.raises(ValueError, match="max_ngram must be at least 1, got 0"):
        NgramDraft(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 cannot be honoured: beam search is not supported"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6 cannot be honoured: contrastive search"),
        ({"dola_layers": "high"}, "dola_layers='high' cannot be honoured"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5 cannot be honoured"),
        (
            {"output_attentions": True, "return_dict_in_generate": True},
            "output_attentions=True cannot be honoured",
        ),
        (
            {"output_hidden_states": True, "return_dict_in_generate": True},
            "output_hidden_states=True cannot be honoured",
        ),
        ({"use_cache": False}, "use_cache=False cannot be honoured"),
        ({"cache_implementation": "static"}, "cache_implementation='static' cannot be honoured"),
        # transformers would hand over to its own continuous batching, without the draft and the image.
        ({"cache_implementation": "paged"}, "cache_implementation='paged' cannot be honoured"),
        ({"token_healing": True}, "token_healing=True cannot be honoured: token healing is not supported"),
        (
            {"generation_config": GenerationConfig(token_healing=True)},
            "token_healing=True cannot be honoured: token healing is not supported",
        ),
        ({"past_key_values": DynamicCache()}, "past_key_values cannot be honoured: fastspec keeps its own"),
        (
            {"prompt_lookup_num_tokens": 3},
            "prompt_lookup_num_tokens belongs to transformers' assisted generation; here it is draft='ngram'",
        ),
        (
            {"assistant_model": TEXT},
            "assistant_model belongs to transformers' assisted generation; here it is draft",
        ),
        (
            {"num_assistant_tokens": 4},
            "num_assistant_tokens belongs to transformers' assisted generation; here it is gamma",
        ),
        ({"custom_generate": "org/repo"}, "fastspec.generate is itself a custom_generate"),
        ({"synced_gpus": True}, "synced_gpus=True cannot be honoured"),
        ({"temprature": 0.3}, "temprature"),
        ({"labels": torch.zeros(1, 1)}, "these arguments cannot be honoured: labels"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_honoured_is_said(arguments, message):
    refused(ValueError, message, **arguments)


def test_input_ids():
    refused(ValueError, "input_ids are missing", inputs={})
    refused(
        TypeError,
        r"int64 or int32 tensor \[batch, length\], got \[3\] torch.int64",
        inputs={"input_ids": torch.arange(3)},
    )
    for dtype in (torch.bool, torch.uint8, torch.complex64):
        ids = torch.ones(1, 3).to(dtype)
        refused(TypeError, rf"int64 or int32 tensor .*, got \[1, 3\] {dtype}", inputs={"input_ids": ids})
    refused(TypeError, "got <class 'list'>", inputs={"input_ids": [[1, 2]]})
    refused(
        ValueError,
        r"must not be empty, got shape \[1, 0\]",
        inputs={"input_ids": torch.zeros(1, 0, dtype=torch.int64)},
    )
    refused(
        ValueError,
        r"must be in \[0, 64\), got values from 1 to 99",
        inputs={"input_ids": torch.tensor([[1, 99]])},
    )
    refused(ValueError, "at most 8 sequences are decoded together, got 9", inputs=picture_inputs(9))
    with pytest.raises(ValueError, match="pass inputs or input_ids, not both"):
        fastspec.generate(TARGET, torch.ones(1, 2, dtype=torch.int64), draft=TEXT, **picture_inputs())


def test_masks_and_positions():
    inputs = picture_inputs(2)
    mask = inputs["attention_mask"]
    right, empty = mask.clone(), mask.clone()
    right[0, -1], empty[1] = 0, 0
    refused(
        ValueError, "prompt 0 must be padded on the left only", inputs={**inputs, "attention_mask": right}
    )
    refused(
        ValueError,
        "prompt 1 is empty: its attention_mask has no ones",
        inputs={**inputs, "attention_mask": empty},
    )
    for columns in (12, 14):
        wrong = torch.ones(2, columns, dtype=torch.int64)
        message = rf"attention_mask must have shape \[2, 13\] as input_ids, got \[2, {columns}\]"
        refused(ValueError, message, inputs={**inputs, "attention_mask": wrong})
    refused(
        TypeError,
        r"attention_mask must be a tensor \[2, 13\], got <class 'list'>",
        inputs={**inputs, "attention_mask": mask.tolist()},
    )
    positions = torch.arange(mask.shape[1]).expand(2, -1) + 5
    refused(ValueError, "position_ids must count from 0", inputs={**inputs, "position_ids": positions})


def test_prompts_that_are_not_token_ids_from_the_start():
    inputs = picture_inputs()
    embeddings = torch.zeros(1, 13, 32)
    refused(ValueError, "input_ids are missing.*inputs_embeds is not", inputs={"inputs_embeds": embeddings})
    refused(
        ValueError,
        "these arguments cannot be honoured: inputs_embeds",
        inputs={**inputs, "inputs_embeds": embeddings},
    )
    cache = DynamicCache(config=TARGET.config.get_text_config())
    filled = torch.zeros(1, 2, 3, 8)
    for layer in range(2):
        cache.update(filled, filled, layer)
    refused(
        ValueError,
        "past_key_values cannot be honoured: fastspec keeps its own cache; pass the whole prompt",
        past_key_values=cache,
    )


def test_models_on_several_devices():
    draft = tiny_llama()
    draft.model.embed_tokens.weight = torch.nn.Parameter(draft.model.embed_tokens.weight.to("meta"))
    refused(ValueError, "draft and target must be on one device, got meta and cpu", draft=draft)


def test_autocast_to_another_precision():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refused(
            ValueError, "torch.autocast to torch.bfloat16 cannot be honoured for a model in torch.float32"
        )
        target, draft = tiny_llava().to(torch.bfloat16), tiny_llama().to(torch.bfloat16)
        assert fastspec.generate(target, draft=draft, **picture_inputs(), max_new_tokens=2).shape == (1, 15)


def test_an_image_draft_without_pixels_is_said_before_any_work(monkeypatch):
    monkeypatch.setattr(SpeculativeDecoder, "_accept", lambda *_: pytest.fail("work was done"))
    features = TARGET.model.get_image_features(
        picture_inputs()["pixel_values"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        return_dict=True,
    )
    from fastspec.generation import make_prompts

    inputs = picture_inputs()
    prompts = make_prompts(TARGET, inputs["input_ids"], [0], {"mm_encoder_outputs": {"image": features}})
    from fastspec.decoder import Request

    with pytest.raises(ValueError, match="an image draft needs pixel_values, got image features only"):
        SpeculativeDecoder(TARGET, CLONE).prefill([Request(prompts[0], 4)])


def test_an_image_draft_that_cannot_take_the_targets_pictures():
    """Its pictures must have the target's size, and take no more tokens."""

    def draft(**vision):
        config = TARGET.config.to_dict()
        config["vision_config"] = {**config["vision_config"], **vision}
        return LlavaForConditionalGeneration(LlavaConfig(**config)).eval()

    with pytest.raises(
        ValueError,
        match=r"the draft's pixel_values must have shape \[images, 3, 32, 32\], got \[1, 3, 16, 16\]",
    ):
        fastspec.generate(TARGET, draft=draft(image_size=32), **picture_inputs(), max_new_tokens=4)
    with pytest.raises(
        ValueError,
        match="the draft's image tokens make its prompt 25 tokens long, longer than the target's 13",
    ):
        fastspec.generate(TARGET, draft=draft(patch_size=4), **picture_inputs(), max_new_tokens=4)


def test_inputs_survive_a_refusal():
    inputs = picture_inputs()
    before = {name: value.clone() for name, value in inputs.items()}
    refused(ValueError, "gamma", inputs=inputs, gamma=0)
    for name, value in before.items():
        assert torch.equal(inputs[name], value)


@pytest.fixture
def picture(tmp_path):
    """Writes a picture and returns its path."""

    def write(name="picture.png", size=(32, 24), **options):
        path = tmp_path / name
        Image.new("RGB", size, "red").save(path, **options)
        return path

    return write


@pytest.mark.parametrize(("name", "options"), [("a.png", {}), ("a.jpg", {}), ("a.webp", {})])
def test_png_jpeg_and_webp_load_as_rgb(picture, name, options):
    image = load_image(picture(name, **options))
    assert (image.mode, image.size) == ("RGB", (32, 24))


def test_transparency_becomes_white_and_rotation_is_undone(tmp_path):
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(clear)
    assert load_image(clear).getpixel((3, 3)) == (255, 255, 255)
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 24)).save(turned, exif=exif)
    assert load_image(turned).size == (24, 16)


def test_image_files_that_cannot_be_used(picture, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"image file not found: nowhere\.png"):
        load_image("nowhere.png")
    with pytest.raises(ValueError, match="image file not found"):
        load_image(tmp_path)
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    with pytest.raises(ValueError, match="is not a PNG, JPEG, WEBP image"):
        load_image(text)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match="is not a PNG, JPEG, WEBP image"):
        load_image(tmp_path / "empty.png")
    gif = tmp_path / "moving.gif"
    Image.new("RGB", (32, 32)).save(gif)
    with pytest.raises(ValueError, match="is not a PNG, JPEG, WEBP image"):
        load_image(gif)
    with pytest.raises(ValueError, match="has 1 x 1 pixels; expected at least 8 on each side"):
        load_image(picture("dot.png", size=(1, 1)))
    whole = picture("whole.jpg", size=(256, 256)).read_bytes()
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        load_image(cut)
    monkeypatch.setenv("FASTSPEC_MAX_IMAGE_PIXELS", "1000")
    with pytest.raises(
        ValueError, match=r"has 40 x 40 pixels, more than the limit of 1,000 \(FASTSPEC_MAX_IMAGE_PIXELS\)"
    ):
        load_image(picture("large.png", size=(40, 40)))


def test_an_image_file_cut_or_altered_anywhere_is_refused_or_loads(picture, exhaustive):
    """Whatever is left of it, nothing but ValueError comes out."""
    generator = random.Random(0)
    refusals = 0
    for name in ("a.png", "a.jpg", "a.webp"):
        path = picture(name, size=(40, 40))
        whole = path.read_bytes()
        for _ in range(300 if exhaustive else 60):
            if generator.random() < 0.5:
                broken = whole[: generator.randrange(len(whole))]
            else:
                place = generator.randrange(len(whole) - 4)
                broken = whole[:place] + generator.randbytes(4) + whole[place + 4 :]
            path.write_bytes(broken)
            try:
                assert load_image(path).mode == "RGB"
            except ValueError:
                refusals += 1
    assert refusals > 60


def test_a_header_that_promises_a_bomb_is_refused(tmp_path):
    """A few bytes that claim 100,000 x 100,000 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = (
        struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT")
    with pytest.raises(ValueError, match=r"more pixels than the limit of 64,000,000 \(FASTSPEC_MAX_IMAGE"):
        load_image(bomb)


def test_the_pixel_limit_is_checked_before_decoding(picture, monkeypatch):
    monkeypatch.setenv("FASTSPEC_MAX_IMAGE_PIXELS", "1000")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="more than the limit"):
        load_image(picture(size=(64, 64)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "FASTSPEC_BACKEND",
            "rocm",
            "FASTSPEC_BACKEND must be one of auto, reference, triton, cuda, got 'rocm'",
        ),
        ("FASTSPEC_MAX_IMAGE_PIXELS", "-1", "FASTSPEC_MAX_IMAGE_PIXELS must be a positive integer, got '-1'"),
        ("FASTSPEC_CUDA", "yes", "FASTSPEC_CUDA must be auto, 0 or 1, got 'yes'"),
        (
            "FASTSPEC_CUDA_ARCHS",
            "80;hopper",
            "FASTSPEC_CUDA_ARCHS must list architectures such as 80;90a, got 'hopper'",
        ),
    ],
)
def test_environment_variables(monkeypatch, name, value, message):
    from fastspec import environment

    read = {
        "FASTSPEC_BACKEND": environment.backend,
        "FASTSPEC_MAX_IMAGE_PIXELS": environment.max_image_pixels,
        "FASTSPEC_CUDA": environment.cuda_build,
        "FASTSPEC_CUDA_ARCHS": environment.cuda_archs,
    }[name]
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        read()
    monkeypatch.delenv(name)
    read()


def test_a_criterion_that_raises_leaves_everything_usable():
    class Broken(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise RuntimeError("judge is ill")

    with pytest.raises(RuntimeError, match="judge is ill"):
        fastspec.generate(
            TARGET,
            draft=TEXT,
            **picture_inputs(),
            max_new_tokens=4,
            stopping_criteria=StoppingCriteriaList([Broken()]),
        )
    fastspec.generate(TARGET, draft=TEXT, **picture_inputs(), max_new_tokens=4)


def test_left_padding_helper_pads_on_the_left():
    inputs = left_padded([torch.tensor([IMAGE_TOKEN_ID]), torch.tensor([5, 6])])
    assert inputs["input_ids"].tolist() == [[0, IMAGE_TOKEN_ID], [5, 6]]
