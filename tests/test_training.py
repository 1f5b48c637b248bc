"""Training: distilled answers, data files, losses, and drafts from the first step to the saved folder."""

import copy
import csv
import itertools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, LlavaForConditionalGeneration, Trainer

import fastspec
from fastspec import miniature
from fastspec.lines import BadLines, DataError, Line
from fastspec.training import meter as training_meter
from fastspec.training import train as training_module
from fastspec.training.answers import AnswerFile
from fastspec.training.batches import Collator, expand
from fastspec.training.chats import Chat, Turn, parse_chat
from fastspec.training.checkpoints import last_good_checkpoint
from fastspec.training.datasets import ChatRows, TextBlocks, shorten
from fastspec.training.distill import Distillation, Question, distill
from fastspec.training.history import History
from fastspec.training.losses import LOSSES, expected_acceptance
from fastspec.training.shrink import Shrinking, shrink
from fastspec.training.sizes import parse_size
from fastspec.training.template import Example, encode_chat, prompt_text
from fastspec.training.train import Training, train_draft

needs_weights = pytest.mark.skipif(
    not miniature.WEIGHTS.exists(),
    reason="the weights are absent; `python -m fastspec.miniature.train` makes them",
)
IMAGE = 4  # the miniature's placeholder


@pytest.fixture(autouse=True)
def one_thread():
    """So small a model only loses by threads, and the order of its sums must not change from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def processor():
    return miniature.load_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pictures, two prompts, and answers that nobody had to wait for."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    records = []
    tokenizer = miniature.load_processor().tokenizer
    for index in range(4):
        example = miniature.sample_example("caption", index)
        example.scene.render().save(folder / "images" / f"{index}.png")
        for turn, (user, assistant) in enumerate(example.turns[:1] * 3):
            token_ids = tokenizer(f" {assistant}", add_special_tokens=False)["input_ids"]
            records.append(
                {
                    "id": f"{index}-{turn}",
                    "image": f"{index}.png",
                    "conversations": [
                        {"from": "human", "value": f"<image>\n{user}"},
                        {"from": "gpt", "value": assistant, "token_ids": [*token_ids, 2]},
                    ],
                }
            )
    (folder / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "prompts.txt").write_text("Describe the picture.\n\nWhat is it?\n")
    return folder


def asked(folder, out, **changes):
    return replace(
        Training(
            target="miniature",
            out=out,
            stage="distill",
            data=(folder / "answers.jsonl",),
            images=folder / "images",
            size="32,1,2,64",
            steps=6,
            batch_size=4,
            learning_rate=3e-3,
            held_out=2,
            log_every=1,
            evaluate_every=100,
            save_every=3,
            device="cpu",
        ),
        **changes,
    )


def course(out, column):
    with (out.parent / f"{out.name}.run" / "losses.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def weights(folder):
    return LlamaForCausalLM.from_pretrained(folder).state_dict()


# Distilled answers


@needs_weights
def test_answers_are_the_targets_own_and_a_kill_loses_and_doubles_nothing(folder, tmp_path, monkeypatch):
    whole = Distillation("miniature", folder / "images", folder / "prompts.txt", tmp_path / "whole.jsonl",
                         draft="miniature", temperatures=(0.0, 1.0), max_new_tokens=6, batch_size=2)  # fmt: skip
    counts = distill(whole)
    lines = whole.out.read_bytes().splitlines(keepends=True)
    assert counts["answers"] == counts["new"] == len(lines) == 4 * 2 * 2

    record = json.loads(lines[1])
    assert record["image"] == "0.png"
    assert record["conversations"][0] == {"from": "human", "value": "<image>\nWhat is it?"}
    processor, target = miniature.load_processor(), miniature.load_target()
    from PIL import Image

    inputs = miniature.prepare(processor, Image.open(folder / "images" / "0.png"), "What is it?")
    alone = target.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = record["conversations"][1]
    assert answer["token_ids"] == alone.tolist()
    assert answer["value"] == processor.tokenizer.decode(alone, skip_special_tokens=True).strip()
    assert record["finish_reason"] == "length"

    # A kill after 6 answers, in the middle of writing the next two.
    append = AnswerFile.append

    def killed(self, records):
        if len(self.done) == 6:
            self._file.write(json.dumps(records[0]).encode()[:50])
            raise KeyboardInterrupt
        append(self, records)

    again = replace(whole, out=tmp_path / "again.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            distill(again)
    assert again.out.read_bytes()[-1:] != b"\n"
    assert distill(again)["new"] == 10
    assert again.out.read_bytes() == whole.out.read_bytes()
    assert distill(again)["new"] == 0

    with pytest.raises(
        ValueError, match=r"other arguments \(max_new_tokens\): max_new_tokens was 6 and is now 9"
    ):
        distill(replace(again, max_new_tokens=9))
    with (
        AnswerFile(tmp_path / "locked.jsonl", {}),
        pytest.raises(ValueError, match="another process is writing"),
    ):
        AnswerFile(tmp_path / "locked.jsonl", {})


def test_every_answer_has_random_numbers_of_its_own():
    chats = [Chat((Turn("user", "What?", 1),), (name,)) for name in ("a.png", "b.png")]
    questions = [Question(line, chat, heat) for line in (1, 2) for chat in chats for heat in (0.5, 1.0)]
    assert len({question.seed(0) for question in questions} | {questions[0].seed(1)}) == 9
    assert questions[0].seed(0) == Question(1, chats[0], 0.5).seed(0)


def test_an_answer_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "x"}\n')
    with pytest.raises(ValueError, match="which would tell of its arguments, is missing"):
        AnswerFile(path, {"seed": 1})
    (tmp_path / "a.jsonl.arguments.json").write_text('{"seed": 1}')
    path.write_text('{"id": "x"}\nnonsense\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not a distilled answer"):
        AnswerFile(path, {"seed": 1})


@needs_weights
def test_questions_of_chats_and_damaged_images(folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folder / "images", images)
    (images / "1.png").write_bytes(b"no picture")
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        "".join(
            json.dumps({"image": name, "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                         {"from": "gpt", "value": "x"}]}) + "\n"
            for name in ("0.png", "1.png", "none.png", "x" * 300)
        )
    )  # fmt: skip
    bad = Distillation("miniature", images, chats, tmp_path / "out.jsonl", max_new_tokens=2)
    with pytest.raises(DataError, match=r"chats\.jsonl, line 3: no image 'none\.png'"):
        distill(bad)
    counts = distill(replace(bad, skip_bad_lines=True))
    assert (counts["answers"], counts["skipped"]) == (1, 3)
    assert json.loads((tmp_path / "out.jsonl").read_text())["id"] == "0.png#1@0"


@needs_weights
@pytest.mark.parametrize("batch_size", [1, 4])
def test_questions_beyond_the_targets_reach(folder, tmp_path, batch_size):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What?\n" + "Why? " * 1000 + "\nWhere?\n")
    asked = Distillation("miniature", folder / "images", prompts, tmp_path / "out.jsonl", max_new_tokens=2,
                         batch_size=batch_size)  # fmt: skip
    with pytest.raises(
        DataError, match=r"prompts\.txt, line 2: the prompt has \d+ tokens, which with 2 new ones"
    ):
        distill(asked)
    counts = distill(replace(asked, skip_bad_lines=True))
    assert (counts["answers"], counts["skipped"]) == (8, 1)
    ids = [json.loads(line)["id"] for line in asked.out.read_text().splitlines()]
    assert ids == [f"{index}.png#{line}@0" for index in range(4) for line in (1, 3)]


# Losses


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


P, Q = (0.5, 0.3, 0.2), (0.1, 0.3, 0.6)


def test_expected_acceptance_by_hand():
    assert expected_acceptance(logits(Q), logits(P)).item() == pytest.approx(0.1 + 0.3 + 0.2)
    assert expected_acceptance(logits(P), logits(P)).item() == pytest.approx(1)
    # The draft lacks the last token, whose 0.2 nothing is accepted for; q is (0.4, 0.6).
    assert expected_acceptance(logits((0.2, 0.3)), logits(P)).item() == pytest.approx(0.4 + 0.3)
    # The target lacks the draft's last token, which is never offered: q is (0.25, 0.75).
    assert expected_acceptance(logits(Q), logits((0.5, 0.5))).item() == pytest.approx(0.25 + 0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cross-entropy", -math.log(0.3)),
        ("forward-kl", sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))),
        ("reverse-kl", sum(q * math.log(q / p) for p, q in zip(P, Q, strict=True))),
        ("total-variation", 0.4),
        ("tvd++", 0.4),
    ],
)
def test_each_loss_is_its_formula_and_its_gradient_leads_down(name, value):
    draft = logits(Q, Q).float().requires_grad_()
    target, answers = logits(P, P).float(), torch.tensor([1, 0])
    loss = LOSSES[name](draft, target, answers)
    assert loss.shape == (2,)
    assert loss[0].item() == pytest.approx(value, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), draft)
    assert gradient.sum(1).abs().max() < 1e-6
    with torch.no_grad():
        stepped = draft - 0.05 * gradient
        if name == "cross-entropy":
            assert stepped.softmax(-1)[0, 1] > 0.3
            assert stepped.softmax(-1)[1, 0] > 0.1
        else:
            assert (gradient[:, 0] < 0).all()  # the target wants more of the first token
            assert (gradient[:, 2] > 0).all()
            assert (expected_acceptance(stepped, target) > expected_acceptance(draft, target)).all()


def test_total_variation_has_the_gradient_of_half_the_distance():
    torch.manual_seed(0)
    draft, target = torch.randn(5, 7).requires_grad_(), torch.randn(5, 7)
    (gradient,) = torch.autograd.grad(LOSSES["total-variation"](draft, target, None).sum(), draft)
    p = target.double().softmax(-1)

    def distance(logits):
        return (p - logits.softmax(-1)).abs().sum() / 2

    for row, token in itertools.product(range(5), range(7)):
        step = torch.zeros(5, 7, dtype=torch.float64)
        step[row, token] = 1e-6
        slope = (distance(draft.detach() + step) - distance(draft.detach() - step)) / 2e-6
        assert gradient[row, token].item() == pytest.approx(slope.item(), abs=1e-6)


def test_tvd_plus_plus_is_a_policy_gradient_with_normalised_rewards():
    torch.manual_seed(0)
    draft, target = torch.randn(5, 7).requires_grad_(), torch.randn(5, 7)
    (gradient,) = torch.autograd.grad(LOSSES["tvd++"](draft, target, None).sum(), draft)
    # Every token of every position, weighted by its chance to be drawn, instead of tokens that are drawn.
    exact = draft.detach().double().requires_grad_()
    drawn = []
    for row, token in itertools.product(range(5), range(7)):
        log_q, p = exact[row].log_softmax(-1)[token], target[row].double().softmax(-1)[token].item()
        chance = log_q.exp().item()
        drawn.append((chance, 1.0 if p > chance else 0.0, log_q))
    mean = sum(chance * reward for chance, reward, _ in drawn) / 5
    deviation = (sum(chance * (reward - mean) ** 2 for chance, reward, _ in drawn) / 5) ** 0.5
    score = sum(-chance * (reward - mean) / deviation * log_q for chance, reward, log_q in drawn)
    (expected,) = torch.autograd.grad(score, exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


def test_no_token_and_a_token_that_the_draft_lacks():
    for loss in LOSSES.values():
        draft = torch.zeros(0, 4).requires_grad_()
        loss(draft, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).sum().backward()
        assert draft.grad is not None
    assert LOSSES["cross-entropy"](torch.zeros(1, 3), None, torch.tensor([3])).item() == 0


# Chats and rows


def chat(*turns, image=None):
    return json.dumps(
        {"image": image, "conversations": [{"from": who, "value": text} for who, text in turns]}
    )


QUESTION, ANSWER = ("human", "What?"), ("gpt", "A disc.")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "expected a JSON object, got 3"),
        ('{"a": ' + "1" * 5000 + "}", "not JSON: Exceeds the limit"),
        ("{}", "no 'conversations', or an empty list"),
        ('{"conversations": [7]}', r"conversations\[0\] is not an object"),
        (chat(("dog", "woof")), "must be one of system, human, gpt, got 'dog'"),
        (chat((["human"], "What?")), r"must be one of system, human, gpt, got \['human'\]"),
        (chat(("human", "What\ud800?"), ANSWER), r"conversations\[0\]\['value'\] holds half of a surrogate pair"),
        (chat(("human", None)), r"conversations\[0\]\['value'\] must be a string"),
        (chat(QUESTION), "must be human, gpt, human, gpt"),
        (chat(ANSWER, QUESTION), "must be human, gpt, human, gpt"),
        (chat(QUESTION, ("gpt", " ")), r"conversations\[1\] says nothing"),
        (chat(QUESTION, ("gpt", "<image> A disc.")), "<image> in a turn of gpt"),
        (chat(("human", "<image>\nWhat?"), ANSWER), "1 <image> tags for 0 images"),
        (chat(QUESTION, ANSWER, image="a.png"), "0 <image> tags for 1 images"),
        (chat(QUESTION, ANSWER, image=[3]), "'image' must be a path or a list of paths"),
        ('{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y", "token_ids": [true]}]}',
         r"conversations\[1\]\['token_ids'\] must be a list of token ids"),
    ],
)  # fmt: skip
def test_malformed_chats_are_named_by_file_line_and_reason(text, reason):
    with pytest.raises(DataError, match=rf"^some/file\.jsonl, line 17: .*{reason}"):
        parse_chat(Line(Path("some/file.jsonl"), 17, 0, text))


@needs_weights
def test_the_assistants_words_are_learned_and_nothing_else(processor):
    turns = (Turn("user", "What?", 1), Turn("assistant", "A red disc."), Turn("user", "Where?"),
             Turn("assistant", "On the left."))  # fmt: skip
    example = encode_chat(processor, Chat(turns, ("a.png",)), distilled=False)
    spoken = [token for token, said in zip(example.ids, example.spoken, strict=True) if said]
    assert processor.tokenizer.decode(spoken) == " A red disc.</s> On the left.</s>"
    assert list(example.ids) == processor.tokenizer(example.text)["input_ids"]
    assert example.ids.count(IMAGE) == 1

    answer = Turn("assistant", "A red disc.", token_ids=(33, 34, 2))
    with pytest.raises(ValueError, match="the token ids spell"):
        encode_chat(processor, Chat((turns[0], answer), ("a.png",)), distilled=True)
    ids = tuple(processor.tokenizer(" A red disc.", add_special_tokens=False)["input_ids"])
    example = encode_chat(
        processor, Chat((turns[0], replace(answer, token_ids=ids)), ("a.png",)), distilled=True
    )
    prompt = prompt_text(processor, Chat(turns[:1], ("a.png",)).messages)
    assert prompt == "USER: <image>\nWhat? ASSISTANT:"
    assert example.ids == (*processor.tokenizer(prompt)["input_ids"], *ids)
    assert sum(example.spoken) == len(ids)


@needs_weights
def test_a_template_without_an_end_token(processor):
    """That of llava-hf/llava-1.5-7b-hf, in short: a space after every turn."""
    processor = copy.deepcopy(processor)
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'][-1]['text'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    turns = (
        Turn("user", "What?"),
        Turn("assistant", "A disc."),
        Turn("user", "Where?"),
        Turn("assistant", "Left."),
    )
    example = encode_chat(processor, Chat(turns), distilled=False)
    spoken = [token for token, said in zip(example.ids, example.spoken, strict=True) if said]
    assert processor.tokenizer.decode(spoken) == " A disc. Left.</s>"
    assert example.num_text == len(example.ids) - 1
    assert processor.tokenizer.decode(example.ids[: example.num_text]).endswith("ASSISTANT: Left.")


@needs_weights
def test_the_target_sees_the_image_and_the_draft_the_text_alone(folder, processor):
    rows = ChatRows([folder / "answers.jsonl"], processor, folder / "images", True, True, 200, BadLines())
    items = [rows[0], rows[11], (Example((1, 7, 8), (True, True, True), "", 0), [])]
    batch = Collator(processor, IMAGE, 3, with_target=True, draft_sees_images=False)(items)
    assert batch["target"]["pixel_values"].shape == (2, 3, 96, 96)
    assert torch.equal(batch["answers"], batch["target"]["answers"])
    for part in (batch, batch["target"]):
        said = [token for example, _ in items for token, spoken in zip(example.ids[1:], example.spoken[1:], strict=True)
                if spoken]  # fmt: skip
        assert part["answers"].tolist() == said
        assert part["input_ids"].flatten()[part["places"] + 1].tolist() == said
        assert (part["places"] % part["input_ids"].shape[1] < part["input_ids"].shape[1] - 1).all()
    assert not (batch["input_ids"] == IMAGE).any()
    for index, (example, pictures) in enumerate(items[:2]):
        asked = processor(images=pictures, text=example.text, return_tensors="pt")
        said = [token for token, spoken in zip(example.ids, example.spoken, strict=True) if spoken]
        ids, mask = (batch["target"][name][index] for name in ("input_ids", "attention_mask"))
        assert ids[mask.bool()].tolist() == asked["input_ids"][0].tolist() + said
        torch.testing.assert_close(batch["target"]["pixel_values"][index], asked["pixel_values"][0])
        kept = batch["input_ids"][index][batch["attention_mask"][index].bool()].tolist()
        assert kept == [token for token in ids[mask.bool()].tolist() if token != IMAGE]
    assert batch["labels"][2].tolist()[:3] == [-100, 7, 8]

    seen = Collator(processor, IMAGE, 3, with_target=False, draft_sees_images=True)(items)
    assert torch.equal(seen["input_ids"], batch["target"]["input_ids"])
    assert "target" not in seen


def test_what_a_processor_puts_around_an_image_is_not_learned():
    example = Example((1, 9, 5, 6, 7), (False, False, False, True, True), "...", 4)
    ids, spoken = expand(example, [1, 8, 9, 9, 9, 6, 5, 6])
    assert ids == [1, 8, 9, 9, 9, 6, 5, 6, 7]
    assert spoken == [False] * 7 + [True, True]
    with pytest.raises(ValueError, match="not those of its tokenizer"):
        expand(example, [1, 9, 5, 8])


def test_long_examples_are_cut_but_never_an_image():
    example = Example((1, 9, 5, 6, 7), (False, False, False, True, True), "...", 4)
    assert shorten(example, 9, 4) is example
    assert shorten(example, 9, 3) == Example((1, 9, 5, 6), (False, False, False, True), "...", 4)
    whole = Example((1, 9, 5, 6, 7), (False, False, True, True, True), "...", 5)
    assert shorten(whole, 9, 2) == Example((1, 9, 5), (False, False, True), "...", 3)
    for length, placeholder in ((2, 9), (3, 7)):
        with pytest.raises(ValueError, match="end before an answer or an image"):
            shorten(example, placeholder, length)


@needs_weights
def test_text_is_packed_with_its_begin_and_end_tokens(tmp_path, processor):
    path = tmp_path / "text.txt"
    path.write_text("A red disc.\nA box.\n\n\nOn the left.\n")
    blocks = TextBlocks([path], processor.tokenizer, 8, BadLines())
    tokens = [token for block, _ in (blocks[i] for i in range(len(blocks))) for token in block.ids]
    assert processor.tokenizer.decode(tokens) == "<s>A red disc.\nA box.</s><s>On the left.</s>"
    assert all(len(blocks[i][0].ids) == 8 for i in range(len(blocks) - 1))
    assert blocks[0][0].spoken == (False,) + (True,) * 7

    # The target's rows would keep the token and the draft's would not: their answers would be others.
    path.write_text("The <image> tag of SVG.\n")
    blocks = TextBlocks([path], processor.tokenizer, 64, BadLines(), placeholder=IMAGE)
    assert IMAGE not in blocks[0][0].ids
    assert processor.tokenizer.decode(blocks[0][0].ids).startswith("<s>The ")

    path.write_bytes(b"A red disc.\n\xff\nA box.\n")
    with pytest.raises(DataError, match=r"text\.txt, line 2: not UTF-8"):
        TextBlocks([path], processor.tokenizer, 8, BadLines())
    bad = BadLines(skip=True)
    assert len(TextBlocks([path], processor.tokenizer, 64, bad)) == 1
    assert len(bad) == 1
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"text\.txt has no text"):
        TextBlocks([path], processor.tokenizer, 8, BadLines())


@needs_weights
def test_bad_lines_are_counted_once_and_skipped(folder, tmp_path, processor):
    good = (folder / "answers.jsonl").read_text().splitlines()[0]
    other = good.replace('"token_ids": [', '"token_ids": [7, 7, 7, ')
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([good, "{", other, good]) + "\n")
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: not JSON"):
        ChatRows([path], processor, folder / "images", True, True, 200, BadLines())
    bad = BadLines(skip=True)
    rows = ChatRows([path], processor, folder / "images", True, True, 200, bad)
    assert len(rows) == 3
    for _ in range(2):  # a line whose fault shows late stands for nothing
        example, pictures = rows[1]
        assert (sum(example.spoken), pictures) == (0, [])
        bad.report(pickle.loads(pickle.dumps(example.fault)))
    assert rows[0][0].fault is None
    assert len(bad) == 2
    assert bad.summary().startswith(f"skipped bad lines: 2 of {path}; the first: {path}, line 2: not JSON")
    with pytest.raises(DataError, match=r"data\.jsonl, line 3: the token ids spell"):
        BadLines().report(example.fault)


@needs_weights
@pytest.mark.parametrize("workers", [0, 1])
def test_lines_that_turn_out_bad_are_counted_wherever_they_are_read(folder, tmp_path, workers):
    lines = (folder / "answers.jsonl").read_text().splitlines()
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\n".join([*lines[:8], lines[8].replace('"token_ids": [', '"token_ids": [7, 7, ')]) + "\n"
    )
    task = asked(folder, tmp_path / "draft", data=(path,), steps=3, workers=workers, held_out=0, save_every=9)
    with pytest.raises(DataError, match=r"data\.jsonl, line 9: the token ids spell"):
        train_draft(task)
    result = train_draft(replace(task, skip_bad_lines=True))
    assert result["skipped"] == 1
    assert "line 9: the token ids spell" in result["note"]


@needs_weights
def test_held_out_lines_that_all_turn_out_bad(folder, tmp_path):
    lines = (folder / "answers.jsonl").read_text().splitlines()[:10]
    (bad,) = training_module._split(lines, 1, seed=0)[1].indices
    lines[bad] = lines[bad].replace('"token_ids": [', '"token_ids": [7, 7, ')
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    task = asked(folder, tmp_path / "draft", data=(path,), held_out=1, steps=1, skip_bad_lines=True)
    result = train_draft(task)
    assert result["skipped"] == 1
    assert (result["held_out_loss"], result["expected_acceptance"]) == (None, None)
    assert course(task.out, "expected_acceptance") == []
    assert "NaN" not in (task.out / "training.json").read_text()


@needs_weights
def test_a_draft_that_learned_from_nothing_is_not_saved(folder, tmp_path):
    task = asked(folder, tmp_path / "draft", max_length=8, steps=1, skip_bad_lines=True)
    with pytest.raises(
        ValueError, match=r"no line of the data could be learned from; skipped bad lines: \d+ of"
    ):
        train_draft(task)
    assert not task.out.exists()


# Training


@needs_weights
@pytest.mark.parametrize("loss", LOSSES)
def test_a_draft_from_scratch_learns_by_every_loss(folder, tmp_path, loss):
    out = tmp_path / "draft"
    result = train_draft(
        asked(folder, out, loss=loss, steps=9, batch_size=3, save_every=100, learning_rate=2e-2)
    )
    losses = course(out, "loss")
    assert course(out, "step")[0] == 0
    assert losses[-1] < 0.99 * losses[0], losses
    acceptance = course(out, "expected_acceptance")
    assert len(acceptance) == 2
    assert acceptance[-1] > acceptance[0]
    assert result["expected_acceptance"] == pytest.approx(acceptance[-1], abs=1e-5)
    if loss == "total-variation":
        assert course(out, "held_out_loss")[-1] == pytest.approx(1 - acceptance[-1], abs=1e-5)

    draft = LlamaForCausalLM.from_pretrained(out)
    assert (draft.config.hidden_size, draft.config.vocab_size, draft.dtype) == (32, 1024, torch.float32)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == miniature.load_processor().tokenizer.get_vocab()


@needs_weights
def test_held_out_acceptance_is_that_of_target_and_draft(folder, tmp_path, processor):
    out = tmp_path / "draft"
    result = train_draft(
        asked(folder, out, steps=1, held_out=1, draft="miniature", size=None, learning_rate=0.0)
    )
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    rows = ChatRows([folder / "answers.jsonl"], processor, folder / "images", True, True, 200, BadLines())
    example, pictures = rows[order[0]]
    answer = torch.tensor([[token for token, said in zip(example.ids, example.spoken, strict=True) if said]])
    inputs = processor(images=pictures, text=example.text, return_tensors="pt")
    prompt = inputs.pop("input_ids")
    inputs.pop("attention_mask")
    with torch.no_grad():
        both = torch.cat([prompt, answer], 1)
        p = miniature.load_target()(input_ids=both, **inputs).logits[0, prompt.shape[1] - 1 : -1].softmax(-1)
        text = prompt[prompt != IMAGE][None]
        q = miniature.load_draft()(torch.cat([text, answer], 1)).logits[0, text.shape[1] - 1 : -1].softmax(-1)
    assert result["expected_acceptance"] == pytest.approx(torch.minimum(p, q).sum(-1).mean().item(), abs=1e-4)


@needs_weights
def test_accumulated_batches_are_one_batch(folder, tmp_path):
    for name, size, passes in (("one", 4, 1), ("two", 1, 4)):
        change = {"batch_size": size, "gradient_accumulation": passes, "steps": 3, "held_out": 0}
        train_draft(asked(folder, tmp_path / name, **change))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=1e-3, atol=1e-4)
    assert course(tmp_path / "one", "loss") == pytest.approx(course(tmp_path / "two", "loss"), rel=1e-4)


def launch(task, processes=2):
    """`accelerate launch -m fastspec train-draft`, as a user would type it."""
    named = {name.replace("_", "-"): value for name, value in vars(task).items() if value is not None}
    data, left = named.pop("data"), ("epochs", "compile")
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes,
             "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0,
             "-m", "fastspec", "train-draft", "--data", *data]  # fmt: skip
    for name, value in named.items():
        if isinstance(value, bool):
            words += [f"--{name}"] * value
        elif name not in left:
            words += [f"--{name}", value]
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(fastspec.__file__).parent.parent,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(task.out.parent / "home"),
            "CUDA_VISIBLE_DEVICES": "",
        },
    )


@pytest.fixture
def alone(folder, tmp_path):
    """What one process learns; two take halves of the same rows, if no epoch ends, where they fill theirs up."""
    lines, bad = (folder / "answers.jsonl").read_text(), tmp_path / "bad.jsonl"
    bad.write_text(lines.replace('"token_ids": [', '"token_ids": [7, 7, '))
    task = asked(folder, tmp_path / "one", data=(folder / "answers.jsonl", bad), steps=4, save_every=2,
                 evaluate_every=2, learning_rate=1e-2, skip_bad_lines=True)  # fmt: skip
    skipped = train_draft(task)["skipped"]
    assert skipped > 5
    return task, skipped


def launched(task, skipped=None):
    done = launch(task)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" parameters in ") == 1
    if skipped is not None:  # by both processes together
        assert f"skipped bad lines: {skipped} of " in done.stderr


def assert_learned_alike(one, two):
    for column in ("step", "loss", "gradient_norm", "held_out_loss", "expected_acceptance"):
        ours, theirs = course(one.out, column), course(two.out, column)
        assert theirs == pytest.approx(ours, rel=1e-4), column
    assert len(course(one.out, "held_out_loss")) == 3
    ours, theirs = weights(one.out), weights(two.out)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-2, atol=1e-3)


@needs_weights
def test_two_processes_learn_what_one_does(alone, tmp_path):
    one, skipped = alone
    two = replace(one, out=tmp_path / "two", batch_size=2)
    launched(two, skipped)
    assert_learned_alike(one, two)
    assert sorted(path.name for path in two.run_folder.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]


@pytest.mark.slow
@needs_weights
def test_two_processes_go_on_from_a_checkpoint(alone, tmp_path):
    one, skipped = alone
    two = replace(one, out=tmp_path / "two", batch_size=2, workers=1)
    launched(two, skipped)
    shutil.rmtree(two.run_folder / "checkpoint-4")  # what an interruption after two steps would have left
    launched(replace(two, resume=True))
    assert_learned_alike(one, two)


@pytest.mark.slow
@needs_weights
def test_compiled_layers_and_losses_learn_the_same(folder, tmp_path):
    task = asked(folder, tmp_path / "plain", loss="tvd++", steps=4)
    train_draft(task)
    compiled = replace(task, out=tmp_path / "compiled", compile=True)
    train_draft(compiled)
    for column in ("loss", "gradient_norm", "expected_acceptance"):
        assert course(compiled.out, column) == pytest.approx(course(task.out, column), rel=1e-3), column
    assert weights(compiled.out).keys() == weights(task.out).keys()


@pytest.mark.gpu
@needs_weights
@pytest.mark.parametrize("loss", ["cross-entropy", "tvd++"])
def test_on_a_gpu_a_draft_learns_and_a_nan_is_found(folder, tmp_path, monkeypatch, loss):
    task = asked(folder, tmp_path / "draft", loss=loss, steps=9, learning_rate=2e-2, device="cuda", workers=1)
    result = train_draft(task)
    acceptance = course(task.out, "expected_acceptance")
    assert acceptance[-1] > acceptance[0]
    assert result["tokens_per_second"] > 0
    assert result["peak_memory_bytes"] > 0

    steps = []

    def diverging(*logits_and_answers):
        steps.append(0)
        return LOSSES[loss](*logits_and_answers) * (math.nan if len(steps) > 4 else 1)

    # The GPU is a step behind when it is looked at; the step that is named is the right one all the same.
    monkeypatch.setattr(training_module, "find_loss", lambda name: diverging)
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at step 5; .* checkpoint is .*/checkpoint-3;"
    ):
        train_draft(replace(task, out=tmp_path / "nan", held_out=0))


@needs_weights
def test_a_resumed_run_ends_like_one_without_interruption(folder, tmp_path, monkeypatch):
    whole, cut = (
        asked(folder, tmp_path / name, steps=7, batch_size=2, loss="forward-kl") for name in ("whole", "cut")
    )
    train_draft(whole)
    step = Trainer.training_step
    with monkeypatch.context() as patch:

        def killed(self, *arguments, **more):
            if self.state.global_step == 5:
                raise KeyboardInterrupt
            return step(self, *arguments, **more)

        patch.setattr(Trainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train_draft(cut)
    with pytest.raises(ValueError, match="has checkpoints of another run: pass --resume"):
        train_draft(cut)
    # What a kill during saving leaves.
    torn = cut.run_folder / "checkpoint-99"
    shutil.copytree(cut.run_folder / "checkpoint-3", torn)
    (torn / "trainer_state.json").write_text('{"global_st')
    start, there = Trainer.train, []
    monkeypatch.setattr(
        Trainer, "train", lambda self, **more: there.append(torn.exists()) or start(self, **more)
    )
    train_draft(replace(cut, resume=True))
    assert there == [False]  # Trainer would take it for the newest and remove good ones
    one, two = weights(whole.out), weights(cut.out)
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())
    assert (whole.run_folder / "losses.csv").read_text() == (cut.run_folder / "losses.csv").read_text()

    # One that was killed after its last checkpoint has nothing left to learn, however often it is resumed.
    shutil.rmtree(cut.out)
    assert train_draft(replace(cut, resume=True))["steps"] == 7
    two = weights(cut.out)
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())
    assert (whole.run_folder / "losses.csv").read_text() == (cut.run_folder / "losses.csv").read_text()
    assert train_draft(replace(cut, resume=True, steps=8))["steps"] == 8


@needs_weights
def test_a_run_is_resumed_with_what_it_was_begun_with(folder, tmp_path):
    data = tmp_path / "answers.jsonl"
    shutil.copy(folder / "answers.jsonl", data)
    task = replace(asked(folder, tmp_path / "draft", steps=3), data=(data,))
    train_draft(task)
    for changes, message in (
        ({"size": "64,1,2,64"}, 'another --size: "32,1,2,64" then, "64,1,2,64" now'),
        ({"seed": 1}, "another --seed: 0 then, 1 now"),  # other examples would be held out
        ({"loss": "forward-kl"}, 'another --loss: "cross-entropy" then, "forward-kl" now'),
    ):
        with pytest.raises(ValueError, match=message):
            train_draft(replace(task, resume=True, **changes))
    assert train_draft(replace(task, resume=True, steps=4, learning_rate=1e-3))["steps"] == 4
    with data.open("a") as file:
        file.write(data.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="another --data"):
        train_draft(replace(task, resume=True))


def test_the_course_as_a_table_and_a_plot(tmp_path):
    history = History(tmp_path, "forward-kl")
    history.begin(0)
    main = SimpleNamespace(global_step=2, is_world_process_zero=True)
    history.on_log(None, main, None, {"loss": 0.5, "grad_norm": math.nan})
    history.on_log(None, main, None, {"eval_loss": 0.25, "eval_expected_acceptance": 0.75})
    history.on_log(None, main, None, {"train_runtime": 3.0})
    history.on_log(None, SimpleNamespace(global_step=3, is_world_process_zero=False), None, {"loss": 9.0})
    rows = (tmp_path / "losses.csv").read_text().splitlines()[1:]
    assert rows == ["2,,0.5,,,,", "2,,,,,0.25,0.75"]
    with (tmp_path / "losses.csv").open("a") as file:
        file.write("3,,0.4")  # cut short by a kill
    history.begin(3)
    assert len(history.rows()) == 2
    pytest.importorskip("matplotlib")
    history.plot()
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@needs_weights
def test_a_full_disk_leaves_the_last_good_checkpoint_and_the_old_draft(folder, tmp_path, monkeypatch):
    task = asked(folder, tmp_path / "draft")
    save = Trainer._save_optimizer_and_scheduler

    def full(self, output_dir):
        if output_dir.endswith("-6"):
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(OSError, match="No space left"):
            train_draft(task)
    assert (task.run_folder / "checkpoint-6" / "model.safetensors").exists()
    good = last_good_checkpoint(task.run_folder)
    assert good == task.run_folder / "checkpoint-3"
    LlamaForCausalLM.from_pretrained(good)

    task.out.mkdir()
    (task.out / "old").touch()
    with monkeypatch.context() as patch:
        patch.setattr(training_module, "asdict", lambda _: full(None, "x-6"))  # the weights are written
        with pytest.raises(OSError, match="No space left"):
            training_module._save(task, miniature.load_draft(), miniature.load_processor(), {})
    assert [path.name for path in task.out.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@needs_weights
@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_disk_that_is_really_full_ends_with_a_message(folder, tmp_path):
    command = [sys.executable, "-m", "fastspec", "train-draft", "--target", "miniature", "--out", tmp_path / "draft",
               "--stage", "distill", "--data", folder / "answers.jsonl", "--images", folder / "images",
               "--size", "64,1,2,64", "--steps", "2", "--save-every", "1", "--device", "cpu"]  # fmt: skip
    limited = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    limited += "os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", limited, *command], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "error: cannot save step 1: " in done.stderr
    assert "the last good checkpoint is none, for none was saved yet" in done.stderr
    assert "Traceback" not in done.stderr


@needs_weights
def test_a_loss_that_is_nan_ends_the_run(folder, tmp_path, monkeypatch):
    def diverging(calls):
        seen = []

        def loss(draft, target, answers):
            seen.append(0)
            return LOSSES["cross-entropy"](draft, target, answers) * (math.nan if len(seen) > calls else 1)

        return loss

    task = asked(folder, tmp_path / "draft", held_out=0)
    monkeypatch.setattr(training_module, "find_loss", lambda name: diverging(4))
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at step 5; .* checkpoint is .*/checkpoint-3;"
    ):
        train_draft(task)
    assert not task.out.exists()

    # A finite loss with a gradient that is not: such weights are never saved.
    def poisoned(draft, target, answers):
        return LOSSES["cross-entropy"](draft, target, answers) + (draft - draft).abs().sum(-1).sqrt()

    monkeypatch.setattr(training_module, "find_loss", lambda name: poisoned)
    task = asked(folder, tmp_path / "other", held_out=0, steps=1)
    with pytest.raises(
        FloatingPointError, match=r"weights are NaN or infinite at step 1; .* none was saved yet"
    ):
        train_draft(task)
    assert last_good_checkpoint(task.run_folder) is None


@needs_weights
@pytest.mark.parametrize("pooling", [1, 2])
def test_an_image_adapter_is_trained_in_two_stages(folder, tmp_path, pooling):
    text = miniature.WEIGHTS / "draft-ft"
    first = asked(folder, tmp_path / "adapter", draft=str(text), size=None, image_adapter=True, train="adapter",
                  image_pooling=pooling, steps=4, loss="forward-kl")  # fmt: skip
    train_draft(first)
    second = asked(folder, tmp_path / "all", draft=str(first.out), size=None, steps=4)
    train_draft(second)
    one, two = (LlavaForConditionalGeneration.from_pretrained(task.out) for task in (first, second))
    assert getattr(two.config, "image_pooling", 1) == pooling
    target, draft = miniature.load_target(), miniature.load_draft()

    for name, weight in target.model.vision_tower.state_dict().items():
        for model in (one, two):
            assert torch.equal(model.model.vision_tower.state_dict()[name], weight), name
    before, after = one.model.language_model.state_dict(), two.model.language_model.state_dict()
    for name, weight in draft.model.state_dict().items():
        assert torch.equal(before[name], weight), name
        assert not torch.equal(after[name], weight), name
    for name, weight in one.model.multi_modal_projector.state_dict().items():
        assert not torch.equal(two.model.multi_modal_projector.state_dict()[name], weight), name
    losses = course(first.out, "loss")
    assert losses[-1] < losses[0]

    picture, prompt = miniature.prompts(1)[0]
    inputs = miniature.load_processor()(images=picture, text=prompt, return_tensors="pt")
    alone = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(
        fastspec.generate(target, draft=two, **inputs, max_new_tokens=12, do_sample=False), alone
    )


# The command line


@needs_weights
def test_an_adapter_alone_gets_over_batches_without_a_picture(folder, tmp_path):
    talk = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A disc."}]}
    pictured = (folder / "answers.jsonl").read_text().splitlines()[:2]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join([json.dumps(talk)] * 4 + pictured) + "\n")
    task = asked(folder, tmp_path / "draft", stage="instruct", data=(path,), image_adapter=True,
                 train="adapter", batch_size=1, held_out=0)  # fmt: skip
    train_draft(replace(task, steps=0, epochs=0.0))
    random = LlavaForConditionalGeneration.from_pretrained(task.out).state_dict()
    train_draft(replace(task, out=tmp_path / "learned"))
    learned = LlavaForConditionalGeneration.from_pretrained(tmp_path / "learned").state_dict()
    moved = {name for name in random if not torch.equal(random[name], learned[name])}
    assert moved
    assert all("multi_modal_projector" in name for name in moved)


@needs_weights
def test_several_files_of_text_by_the_command_line(run, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("A red disc is on the left.\n\n" * 40)
    out = tmp_path / "draft"
    status, printed, _ = run("train-draft", "--target", "miniature", "--out", out, "--size", "16,1,2,32", "--stage",
                             "pretrain", "--data", tmp_path / "a.txt", tmp_path / "b.txt", "--max-length", 32,
                             "--steps", 2, "--device", "cpu")  # fmt: skip
    assert status == 0
    assert "\n35,376 parameters in " in printed
    assert "after 2 steps, expected acceptance 0." in printed
    assert " tokens per second\n" in printed
    assert json.loads((out / "training.json").read_text())["arguments"]["stage"] == "pretrain"
    assert LlamaForCausalLM.from_pretrained(out).config.intermediate_size == 32


def test_sizes():
    assert parse_size("115m").hidden == 1024
    assert parse_size("64,2,4,96").layers == 2
    for text, message in (("big", "115m, tiny or"), ("64,2,4", "hidden,layers,heads,ffn"),
                          ("64,0,4,96", "positive"), ("60,2,8,96", "heads"), ("12,2,4,96", "even")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parse_size(text)


@needs_weights
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": str(miniature.WEIGHTS / "draft-ft")}, TypeError, "a LLaVA-shaped model .* got model_type 'llama'"),
        ({"target": "no/such"}, ValueError, "cannot load the target from no/such"),
        ({"stage": "practice"}, ValueError, "unknown stage 'practice'; expected one of pretrain, instruct, distill"),
        ({"loss": "hinge"}, ValueError, r"unknown loss 'hinge'; expected one of cross-entropy, .*tvd\+\+"),
        ({"draft": "miniature"}, ValueError, "--size is for a new draft"),
        ({"draft": "ngram", "size": None}, ValueError, "no model that could be trained"),
        ({"stage": "pretrain", "train": "adapter"}, ValueError, "--train adapter learns from pictures"),
        ({"train": "adapter"}, ValueError, "a text-only draft has no adapter"),
        ({"image_pooling": 2}, ValueError, "--image-pooling is for a new image adapter"),
        ({"image_adapter": True, "image_pooling": 5}, ValueError, "144 image features cannot be pooled by 5 x 5"),
        ({"resume": True}, ValueError, "nothing to resume: no complete checkpoint"),
        ({"data": (Path("none.jsonl"),)}, ValueError, r"file not found: none\.jsonl"),
        ({"max_length": 8}, DataError, r"line \d+: its first 8 tokens"),
        ({"images": None}, DataError, r"answers\.jsonl, line 1: no image '0\.png'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(folder, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train_draft(asked(folder, tmp_path / "draft", **changes))
    assert not (tmp_path / "draft").exists()


@needs_weights
def test_text_that_tells_of_image_tags(folder, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A red disc in an <image> tag.\n\n" * 40)
    task = asked(folder, tmp_path / "draft", stage="pretrain", data=(path,), max_length=16, loss="forward-kl")
    assert train_draft(task)["steps"] == 6


@needs_weights
def test_a_compact_draft_is_not_trained_further(folder, tmp_path):
    shrink(Shrinking("miniature", tmp_path / "compact", weights="int8"))
    with pytest.raises(ValueError, match="is not trained further: train its original, then shrink it"):
        train_draft(asked(folder, tmp_path / "draft", draft=str(tmp_path / "compact"), size=None))


@needs_weights
def test_a_folder_of_other_things_is_never_replaced(folder, tmp_path):
    out = tmp_path / "models"
    out.mkdir()
    (out / "thesis.txt").touch()
    task = asked(folder, out, steps=1)
    for work in (partial(train_draft, task), partial(shrink, Shrinking("miniature", out, weights="int8"))):
        with pytest.raises(ValueError, match=r"--out .*models has files, which would be lost"):
            work()
        with pytest.raises(ValueError, match=r"--out must be a folder, .*thesis\.txt is a file"):
            partial(work.func, replace(work.args[0], out=out / "thesis.txt"))()
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    (out / "thesis.txt").unlink()
    train_draft(task)
    train_draft(replace(task, resume=True, steps=2))
    shrink(Shrinking("miniature", tmp_path / "compact", weights="int8"))
    shrink(Shrinking("miniature", tmp_path / "compact", weights="int8"))


@needs_weights
def test_bad_files_end_with_a_message(run, folder, tmp_path):
    good = (folder / "answers.jsonl").read_text().splitlines()[0]
    told = json.loads(good)
    del told["conversations"][1]["token_ids"]
    for content, message in (
        ("", "data.jsonl is empty"),
        ("{\n", "data.jsonl, line 1: not JSON"),
        (good + "\n" + json.dumps(told) + "\n", "data.jsonl, line 2: the answer has no 'token_ids'"),
        (good + "\n", "1 example is too little to hold one out"),
    ):
        (tmp_path / "data.jsonl").write_text(content)
        status, _, err = run("train-draft", "--target", "miniature", "--out", tmp_path / "draft", "--size", "tiny",
                             "--stage", "distill", "--data", tmp_path / "data.jsonl", "--images",
                             folder / "images", "--device", "cpu")  # fmt: skip
        assert status == 2
        assert "error: " in err
        assert message in err
        assert "Traceback" not in err


@needs_weights
def test_a_tokenizer_that_disagrees(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(miniature.WEIGHTS / "draft-ft", other)
    path = other / "tokenizer.json"
    tokens = json.loads(path.read_text())
    vocabulary = tokens["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokens))
    with pytest.raises(ValueError, match="vocabularies disagree on 2 tokens"):
        train_draft(asked(folder, tmp_path / "draft", draft=str(other), size=None))


@needs_weights
def test_the_meter_counts_all_steps_but_the_first(monkeypatch):
    clock = iter((10.0, 11.0, 20.0, 22.0))  # two steps, an evaluation, a step
    monkeypatch.setattr(training_meter, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    meter, draft = training_meter.Meter(), miniature.load_draft()
    assert meter.summary(draft, 1)["tokens_per_second"] is None
    there = (SimpleNamespace(device=torch.device("cpu")), None,
             SimpleNamespace(should_evaluate=False, should_save=False, should_training_stop=False))  # fmt: skip
    meter.on_evaluate(*there)  # that before the first step
    for place, batches in enumerate(((7,), (4, 2), (9,))):
        for tokens in batches:
            meter.count(torch.ones(1, tokens))
        meter.on_step_end(*there)
        if place == 1:
            meter.on_evaluate(*there)
    facts = meter.summary(draft, 2)
    assert facts["tokens_per_second"] == 2 * (4 + 2 + 9) / (1.0 + 2.0)
    # The head is the embedding: its matrix counts once.
    assert facts["operations_per_second"] == 6 * 172_352 * facts["tokens_per_second"]
    assert facts["peak_memory_bytes"] is None
