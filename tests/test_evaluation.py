"""``fastspec evaluate``: figures worked out by hand, runs that were killed, task files with mistakes."""

import dataclasses
import json
import math
import re
import shutil
import sys
from itertools import product

import numpy as np
import pytest
import torch
from models import IMAGE_SIZE, IMAGE_TOKEN_ID, IMAGE_TOKENS, noisy_clone, tiny_llama, tiny_llava
from PIL import Image
from transformers import BatchFeature

import fastspec
from fastspec import evaluation, miniature, report, runs
from fastspec.combination import PLAIN, Combination, combine
from fastspec.command import chat_text
from fastspec.journal import Journal
from fastspec.metrics import bootstrap_interval
from fastspec.miniature import tokens as miniature_tokens
from fastspec.runs import Run
from fastspec.summary import summarise
from fastspec.tasks import Task, TaskPrompt, read_task

needs_weights = pytest.mark.skipif(
    not miniature.WEIGHTS.exists(),
    reason="the weights are absent; `python -m fastspec.miniature.train` makes them",
)


class ToyProcessor:
    """As much of a processor as tiny models need: a token per character, no chat template."""

    image_token = "<image>"
    chat_template = None

    class tokenizer:  # noqa: N801, an attribute of every processor
        eos_token_id = 2

    def __call__(self, images, text, return_tensors):
        images = images or []
        if any(image.height > 64 for image in images):
            raise ValueError("too tall")
        head, words = [IMAGE_TOKEN_ID] * IMAGE_TOKENS * len(images), text.replace("<image>", "")
        ids = [1, *head, *(4 + ord(character) % 60 for character in words)]
        data = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if images:
            pixels = [
                np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE)), dtype=np.float32) / 128 - 1
                for image in images
            ]
            data["pixel_values"] = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        return BatchFeature(data)


@pytest.fixture
def toys(monkeypatch):
    """Tiny models under the names that the command line gives them."""
    target = tiny_llava()
    drafts = {"near": noisy_clone(target, 0.3), "far": tiny_llama(), "ngram": "ngram"}
    monkeypatch.setattr(evaluation, "load_target", lambda models: (ToyProcessor(), target))
    monkeypatch.setattr(evaluation, "load_draft", lambda models: (drafts[models.draft], None))
    return target, drafts


@pytest.fixture
def run(run, monkeypatch):
    """Wide enough for a whole table."""
    monkeypatch.setenv("COLUMNS", "200")
    return run


@pytest.fixture
def decoded(monkeypatch):
    """What was decoded, in order."""
    names, run = [], runs.Decoding.run

    def counted(self, task, prompt, inputs, params, combination):
        names.append((task.name, prompt.id, params.temperature, combination))
        return run(self, task, prompt, inputs, params, combination)

    monkeypatch.setattr(runs.Decoding, "run", counted)
    return names


PROMPTS = (
    {"id": "sky", "images": ["a.png"], "prompt": "What is up?"},
    {"id": 7, "prompt": "No picture at all"},
    {"id": "two", "images": ["a.png", "b.png"], "conversations": [
        {"from": "human", "value": "<image>\nAnd <image>?"}, {"from": "gpt", "value": "Yes."}]},
)  # fmt: skip


@pytest.fixture
def questions(tmp_path):
    """A task file with pictures beside it."""
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{name}.png")
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return path


ASKED = ("evaluate", "--target", "toy", "--draft", "near", "--gamma", 2, "--temperature", 0, "--temperature", 1,
         "--max-new-tokens", 8, "--task", "questions.jsonl")  # fmt: skip


def records(folder):
    """The journal's runs by what they are of, without their times; none may be there twice."""
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()[1:]]
    for line in lines:
        del line["first_token_seconds"], line["decoding_seconds"]
    made = {
        Run.from_json({**line, "first_token_seconds": 0, "decoding_seconds": 0}).key: line for line in lines
    }
    assert len(made) == len(lines)
    return made


# Intervals


def test_the_interval_of_two_prompts():
    # Nine tokens in three passes and one in one: a resample holds the first prompt twice, both, or the second
    # twice, in 1, 2 and 1 of 4 cases. Its ratio of sums is 3, 10/4 and 1.
    samples = np.array([[9, 3], [1, 1]])

    def ratio(sums):
        return sums[..., 0] / sums[..., 1]

    assert bootstrap_interval(samples, ratio) == (1.0, 3.0)
    assert bootstrap_interval(samples, ratio, level=0.4) == (2.5, 2.5)
    assert bootstrap_interval(samples, ratio, level=0.9) == (1.0, 3.0)


def test_the_interval_of_many_prompts_is_that_of_the_normal_law():
    values = np.random.default_rng(5).normal(10, 2, 400)
    low, high = bootstrap_interval(
        np.stack([values, np.ones(400)], 1), lambda sums: sums[..., 0] / sums[..., 1]
    )
    # The quantiles of 2000 resamples have a standard error of about 5 % of the half-width.
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.2 * half)


def test_where_there_is_no_interval():
    def ratio(sums):
        return sums[..., 0] / sums[..., 1]

    assert bootstrap_interval([(3, 1)], ratio) is None  # one prompt
    assert bootstrap_interval([(0, 0), (0, 0)], ratio) is None  # nothing was decoded
    assert bootstrap_interval([(0, 0), (4, 2)], ratio) == (2.0, 2.0)  # resamples without a pass say nothing


# Figures


def made_run(prompt, combination, tokens, accepted, first, seconds, **changed):
    """A run of the task "t": cycles by how many drafted tokens each kept."""
    cycles = sum(accepted)
    given = {
        "task": "t",
        "prompt": prompt,
        "temperature": 0.0,
        "draft": combination.draft,
        "branching": combination.branching,
        "rule": combination.rule,
        "seed": 0,
        "num_prompt_tokens": 9,
        "token_ids": tuple(tokens),
        "drafted": "",
        "cycles": cycles,
        "committed": cycles + sum(count * times for count, times in enumerate(accepted)),
        "accepted": tuple(accepted),
        "cost_ratio": 0.1 if combination.draft else 0.0,
        "finish_reason": "eos",
        "first_token_seconds": first,
        "decoding_seconds": seconds,
    }
    return Run(**{**given, **changed})


def test_a_row_of_the_results():
    way = Combination("d", (1, 1), "block")
    task = Task("t", tuple(TaskPrompt(name, "x", (), "") for name in "abc"))
    made = [
        made_run("a", way, range(10), (1, 1, 2), 0.5, 2.0),  # 9 tokens in 4 passes
        made_run("b", way, range(4), (3, 0, 0), 0.1, 1.0),  # 3 in 3
        made_run("c", way, [5], (0, 0, 0), 0.2, 0.0, finish_reason="length"),  # ended with the prefill
        made_run("a", PLAIN, range(10), (9,), 0.4, 4.5),
        made_run("b", PLAIN, [0, 1, 2, 9], (3,), 0.1, 1.5),
        made_run("c", PLAIN, [5], (0,), 0.2, 0.0, finish_reason="length"),
    ]
    row = summarise(task, 0.0, way, {run.key: run for run in made})
    assert (row["prompts"], row["tokens"], row["target_passes"]) == (3, 15, 7)
    assert row["block_efficiency"] == pytest.approx(12 / 7)
    # Seven passes: three kept a first token, two of them a second.
    assert row["acceptance_by_position"] == pytest.approx((3 / 7, 2 / 7))
    assert row["mbsu"] == pytest.approx(12 / 7 / (0.1 * 2 + 1))
    assert row["tokens_per_second"] == pytest.approx(12 / 3)
    assert row["plain_tokens_per_second"] == pytest.approx(12 / 6)
    assert row["speedup"] == pytest.approx(2)
    assert row["speedup_with_first_token"] == pytest.approx((15 / 3.8) / (15 / 6.7))
    assert (row["first_token_seconds"], row["plain_first_token_seconds"]) == (0.2, 0.2)
    assert (row["identical"], row["differing"]) == (False, ["b"])
    assert row["finish_reasons"] == {"eos": 2, "length": 1}
    # Prompts a and b alone, either doubled, bound every resample: 9/4 and 3/3 tokens per pass.
    assert row["block_efficiency_interval"] == pytest.approx((1.0, 9 / 4))
    assert row["speedup_interval"] == pytest.approx((1.5, 4.5 / 2))

    plain = summarise(task, 0.0, PLAIN, {run.key: run for run in made})
    assert (plain["block_efficiency"], plain["mbsu"], plain["speedup"]) == (1, 1, 1)
    assert (plain["shape"], plain["acceptance_by_position"]) == ("-", ())


def test_a_row_of_nothing_has_no_rates():
    way = Combination("d", (1,), "block")
    task = Task("t", (TaskPrompt("a", "x", (), ""),))
    made = [made_run("a", one, [5], (0, 0), 0.5, 0.0) for one in (way, PLAIN)]
    row = summarise(task, 0.0, way, {run.key: run for run in made})
    assert row["block_efficiency"] is row["mbsu"] is row["tokens_per_second"] is row["speedup"] is None
    json.dumps(row, allow_nan=False)
    assert "identical" not in summarise(
        task, 1.0, way, {dataclasses.replace(run, temperature=1.0).key: run for run in made}
    )


def test_rows_are_what_generate_does(run, toys, questions, tmp_path):
    target, drafts = toys
    status, out, notes = run(
        *ASKED, "--draft", "far", "--tree", "2,1", "--rule", "drafter_invariant", "--out", "out"
    )
    assert status == 0, notes
    results = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    made = records(tmp_path / "out")
    rows = {(row["temperature"], row["draft"], row["shape"]): row for row in results["rows"]}
    shapes = [
        (None, "-"),
        *((draft, shape) for draft in ("near", "far") for shape in ("chain 2", "tree 2,1")),
    ]
    assert set(rows) == {(temperature, *shape) for temperature in (0, 1) for shape in shapes}
    assert len(made) == len(rows) * len(PROMPTS)

    processor, task = ToyProcessor(), read_task("questions.jsonl")
    for (temperature, draft, _), row in rows.items():
        committed = cycles = 0
        for prompt in task.prompts:
            images = prompt.load_images()
            inputs = processor(images, "<image>\n" * len(images) + prompt.text, "pt")
            combination = Combination(draft, tuple(row["branching"]), row["rule"])
            line = made["questions.jsonl", prompt.id, float(temperature), combination]
            sampling = {"do_sample": True, "temperature": 1.0} if temperature else {"do_sample": False}
            if draft is not None:
                output = fastspec.generate(
                    target, draft=drafts[draft], tree=combination.tree, rule=combination.rule,
                    seed=line["seed"], **inputs, **sampling, top_k=0, max_new_tokens=8,
                    return_dict_in_generate=True,
                )  # fmt: skip
                speculation = output.speculation
                assert line["accepted"] == list(speculation.accepted[0])
                assert line["drafted"] == "".join(str(int(one)) for one in speculation.drafted[0])
                committed += speculation.committed[0]
                cycles += speculation.cycles[0]
                sequence = output.sequences
            elif temperature == 0:
                sequence = target.generate(**inputs, do_sample=False, max_new_tokens=8)
            else:
                continue
            length = inputs["input_ids"].shape[1]
            assert line["token_ids"] == sequence[0, length:].tolist()
            assert line["num_prompt_tokens"] == length
        if draft is not None:
            assert row["block_efficiency"] == pytest.approx(committed / cycles)
        assert row.get("identical") == (True if temperature == 0 else None)
    assert rows[0, "near", "chain 2"]["block_efficiency"] > rows[0, "far", "chain 2"]["block_efficiency"] >= 1

    header = results["header"]
    assert header["arguments"]["gammas"] == [2]
    assert header["drafts"]["far"]["parameters"] == sum(one.numel() for one in tiny_llama().parameters())
    assert header["fastspec"] == fastspec.__version__
    for title in ("questions, temperature 0", "questions, temperature 1"):
        assert title in out
    assert len(re.findall(r"^ *near .*tree 2,1 +drafter_invariant +[\d.]+", out, re.MULTILINE)) == 2


def test_seeds_are_fixed_for_each_prompt_and_combination(run, toys, questions, tmp_path):
    for folder, seed in (("one", 3), ("two", 3), ("other", 4)):
        assert run(*ASKED, "--seed", seed, "--out", folder)[0] == 0
    one, two, other = (records(tmp_path / folder) for folder in ("one", "two", "other"))
    assert one == two
    assert len({line["seed"] for line in one.values()}) == len(one)
    for key, line in one.items():
        assert line["seed"] != other[key]["seed"]
        if key[2] == 0:
            assert line["token_ids"] == other[key]["token_ids"]
    assert any(one[key]["token_ids"] != other[key]["token_ids"] for key in one)


def test_the_first_token_s_time_is_apart_from_decoding(run, toys, questions, monkeypatch, tmp_path):
    # A clock that advances by a second with each look: at the start, at the first token, at the end.
    monkeypatch.setattr(runs.time, "perf_counter", iter(range(10_000)).__next__)
    assert run(*ASKED, "--limit", 1, "--out", "out")[0] == 0
    for line in (tmp_path / "out" / "journal.jsonl").read_text().splitlines()[1:]:
        assert (json.loads(line)["first_token_seconds"], json.loads(line)["decoding_seconds"]) == (1, 1)


def test_the_end_of_sequence_ends_an_answer(run, toys, questions, tmp_path):
    target, _ = toys
    assert run(*ASKED, "--out", "out")[0] == 0
    # A token in the middle of some greedy answer becomes the end of all.
    answers = {key: line["token_ids"] for key, line in records(tmp_path / "out").items() if key[2] == 0}
    target.generation_config.eos_token_id = [2, answers["questions.jsonl", "7", 0.0, PLAIN][3]]
    assert run(*ASKED, "--out", "ended")[0] == 0
    for key, tokens in answers.items():
        ends = [place for place, token in enumerate(tokens) if token in target.generation_config.eos_token_id]
        line = records(tmp_path / "ended")[key]
        assert line["token_ids"] == tokens[: ends[0] + 1 if ends else None]
        assert line["finish_reason"] == ("eos" if ends else "length")


# Resuming


def test_a_killed_run_continues(run, toys, questions, decoded, tmp_path):
    asked = [*ASKED, "--limit", 2]
    assert run(*asked, "--out", "whole")[0] == 0
    whole, results = (
        records(tmp_path / "whole"),
        json.loads((tmp_path / "whole" / "results.json").read_text()),
    )
    data = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", data)]
    everything = list(decoded)
    assert len(everything) == len(set(everything)) == len(whole) == 8
    # Within the header, right after it, within a line, a line but for its end, a whole line, everything.
    cuts = ((50, 0), (ends[0], 0), (ends[4] + 60, 4), (ends[5] - 1, 4), (ends[5], 5), (ends[-1], 8))
    for cut, there in cuts:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        (tmp_path / "killed").mkdir()
        (tmp_path / "killed" / "journal.jsonl").write_bytes(data[:cut])
        decoded.clear()
        status, _, notes = run(*asked, "--out", "killed")
        assert status == 0, notes
        assert decoded == everything[there:]
        assert (f"{there} runs are in killed/journal.jsonl already" in notes) == bool(there)
        assert records(tmp_path / "killed") == whole
        again = json.loads((tmp_path / "killed" / "results.json").read_text())
        for row, other in zip(results["rows"], again["rows"], strict=True):
            timed = [name for name in row if "seconds" in name or "per_second" in name or "speedup" in name]
            assert len(timed) == 7
            assert {**row, **dict.fromkeys(timed)} == {**other, **dict.fromkeys(timed)}


def test_what_was_decoded_before_a_failure_is_kept(run, toys, questions, monkeypatch, tmp_path):
    append, room = Journal.append, [5]

    def full(self, record):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        status, _, notes = run(*ASKED, "--out", "out")
    assert status == 2
    assert "No space left on device" in notes
    assert len(records(tmp_path / "out")) == 5
    assert not (tmp_path / "out" / "results.json").exists()
    assert run(*ASKED, "--out", "out")[0] == 0
    assert len(records(tmp_path / "out")) == 12


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--gamma", 3], "another gammas: [2] there, [2, 3] now"),
        (["--seed", 1], "another seed: 0 there, 1 now"),
        (["--top-p", 0.5], "another top_p: 1.0 there, 0.5 now"),
        (["--draft", "ngram"], 'another drafts: ["near"] there, ["near", "ngram"] now'),
    ],
)
def test_a_journal_of_other_arguments_is_refused(run, toys, questions, decoded, tmp_path, changed, message):
    assert run(*ASKED, "--limit", 1, "--out", "out")[0] == 0
    before = (tmp_path / "out" / "journal.jsonl").read_bytes()
    decoded.clear()
    status, _, notes = run(*ASKED, "--limit", 1, *changed, "--out", "out")
    assert status == 2
    assert f"error: out/journal.jsonl is of a run with {message}; write elsewhere, or delete it" in notes
    assert decoded == []
    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == before


def test_a_journal_of_other_weights_or_prompts_is_refused(run, toys, questions):
    _, drafts = toys
    asked = [*ASKED, "--draft", "far", "--limit", 1, "--out", "out"]
    assert run(*asked)[0] == 0
    with torch.no_grad():
        drafts["far"].model.layers[0].mlp.down_proj.weight.add_(1e-3)
    status, _, notes = run(*asked)
    assert status == 2
    assert "out/journal.jsonl is of a run with another draft weights" in notes
    with torch.no_grad():
        drafts["far"].model.layers[0].mlp.down_proj.weight.copy_(
            tiny_llama().model.layers[0].mlp.down_proj.weight
        )
    assert run(*asked)[0] == 0
    questions.write_text(questions.read_text().replace("What is up?", "What is down?"))
    status, _, notes = run(*asked)
    assert status == 2
    assert "out/journal.jsonl is of a run with another task contents" in notes


def test_a_journal_that_is_none(tmp_path):
    path, header = tmp_path / "folder" / "journal.jsonl", {"gamma": 3}
    with Journal(path, header) as journal:
        journal.append({"one": 1})
        journal.append({"two": [2, "é"]})
        with pytest.raises(ValueError, match="in use by another run"):
            Journal(path, header)
    whole = path.read_bytes()
    for data, message in (
        (b"some notes of mine", "not a journal"),
        (b"some notes\nof mine\n", "not a journal"),
        (b"[]\n" + whole, "not a journal"),
        (b'{"other": 3}\n', "not a journal"),
        (b'{"gamma": 3, "other": 3}\n', "not a journal"),
        (whole.replace(b'{"one"', b'"one"'), "line 2: damaged"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            Journal(path, header)
        assert path.read_bytes() == data  # what may be a user's file is left as it is
    for rest in (b'{"thr', b'{"three": 3}', b"\0\0\0", b"\0\0\0\n"):
        path.write_bytes(whole + rest)
        with Journal(path, header) as journal:
            assert journal.records == [{"one": 1}, {"two": [2, "é"]}]
            journal.append({"four": 4})
        with Journal(path, header) as journal:
            assert journal.records[2:] == [{"four": 4}]
    path.write_bytes(b'{"gamma": 5}\n')  # of a run that ended before its first record
    with Journal(path, header) as journal:
        assert journal.records == []
        journal.append({"one": 1})
    with Journal(path, header) as journal:
        assert journal.records == [{"one": 1}]
    with pytest.raises(ValueError, match="another gamma: 3 there, 5 now"):
        Journal(path, {"gamma": 5})
    with Journal(path, header) as journal, pytest.raises(ValueError, match="not JSON compliant"):
        journal.append({"rate": math.nan})


# Task files


def test_reading_a_task(questions, tmp_path):
    task = read_task(str(questions))
    assert [prompt.id for prompt in task.prompts] == ["sky", "7", "two"]
    assert [prompt.text for prompt in task.prompts] == ["What is up?", "No picture at all", "And ?"]
    assert [len(prompt.images) for prompt in task.prompts] == [1, 0, 2]
    red, blue = (image.getpixel((3, 3)) for image in task.prompts[2].load_images())
    assert (red, blue) == ((255, 0, 0), (0, 0, 255))

    lines = [
        {"id": "1", "image": "a.png", "conversations": [
            {"from": "system", "value": "Be kind."}, {"from": "human", "value": "<image>\nWho?"},
            {"from": "gpt", "value": "Me."}, {"from": "human", "value": "Why?"}], "model": "x"},
        {"id": "2", "images": [str(tmp_path / "b.png")], "prompt": "Absolute. "},
        {"id": "3", "image": None, "prompt": "None"},
        {"id": "4", "conversations": [{"from": "human", "value": "First?"}, {"from": "gpt", "value": "Yes."}]},
    ]  # fmt: skip
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "more.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\n".join(json.dumps(line).encode() for line in lines))
    task = read_task(str(path), image_folder=tmp_path)
    assert [(prompt.text, len(prompt.images)) for prompt in task.prompts] == [
        ("Why?", 1), ("Absolute.", 1), ("None", 0), ("First?", 0)]  # fmt: skip
    assert [prompt.history for prompt in task.prompts] == [(("Who?", "Me."),), (), (), ()]
    assert task.prompts[1].where == (path, 3)
    path.write_text(json.dumps(lines[1]) + "\nnothing of the kind\n")
    assert len(read_task(str(path), limit=1).prompts) == 1  # lines after the limit are not read


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: Expecting property name"),
        (b'{"id": "\xff"}', "not UTF-8: "),
        (b"[1, 2]", "expected a JSON object, got [1, 2]"),
        (b"[" * 100_000, "not JSON: "),
        (b'{"prompt": "x"}', "expected 'id' to be a text or a whole number, got nothing"),
        (b'{"id": true, "prompt": "x"}', "expected 'id' to be a text or a whole number, got true"),
        (b'{"id": "first", "prompt": "x"}', "id 'first' was given to line 1 already"),
        (b'{"id": "a"}', "expected either 'prompt' or 'conversations', got neither"),
        (b'{"id": "a", "prompt": "x", "conversations": []}', "'prompt' or 'conversations', got both"),
        (b'{"id": "a", "prompt": 5}', "expected 'prompt' to be a text, got 5"),
        (b'{"id": "a", "prompt": " "}', "the prompt is empty"),
        (b'{"id": "a", "image": "a.png", "prompt": "<image>"}', "the prompt is empty"),
        (b'{"id": "a", "prompt": "\\ud800"}', "surrogates not allowed"),
        (b'{"id": "a", "conversations": "x"}', "expected 'conversations' to be a list of turns, got \"x\""),
        (b'{"id": "a", "conversations": [{"from": "gpt", "value": "x"}]}', "no turn of 'conversations' is from"),
        (b'{"id": "a", "conversations": [{"from": "human"}]}', "'value' to be a text, got nothing"),
        (b'{"id": "a", "conversations": [{"from": "human", "value": "x"}, {"from": "human", "value": "y"}]}',
         "must be human, gpt, human"),
        (b'{"id": "a", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}, '
         b'{"from": "human", "value": "y"}]}', "a turn of 'conversations' says nothing"),
        (b'{"id": "a", "images": "a.png", "image": "a.png", "prompt": "x"}', "'images' or 'image', got both"),
        (b'{"id": "a", "images": [5], "prompt": "x"}', "expected 'images' to be a list of paths, got [5]"),
        (b'{"id": "a", "images": ["no.png"], "prompt": "x"}', "image file not found: 'no.png'"),
        (b'{"id": "a", "images": ["a\\u0000b"], "prompt": "x"}', "image file not found: "),
        (b'{"id": "a", "images": ["a.png"], "prompt": "<image> or <image>"}', "2 <image> placeholders, but 1 images"),
        (b'{"id": "a", "prompt": "<image> x"}', "1 <image> placeholders, but 0 images"),
    ],
)  # fmt: skip
def test_a_malformed_line_ends_with_its_number(run, toys, questions, decoded, tmp_path, line, reason):
    (tmp_path / "bad.jsonl").write_bytes(b'{"id": "first", "prompt": "x"}\n\n' + line + b"\n")
    status, _, notes = run(*ASKED, "--task", "bad.jsonl", "--out", "out")
    assert status == 2
    assert notes.startswith("error: bad.jsonl, line 3: ")
    assert reason in notes
    assert decoded == []
    assert not (tmp_path / "out").exists()


@needs_weights
def test_earlier_turns_stand_before_the_question():
    processor, target = miniature.load_processor(), miniature.load_target()
    decoding = runs.Decoding(processor, target, {}, [], 4)
    (prompt,) = read_task("miniature:follow-up", 1).prompts
    example = miniature.sample_example("conversation", 0)
    assert (*prompt.history, (prompt.text, example.turns[-1][1])) == example.turns
    inputs = processor(
        images=example.scene.render(),
        text=miniature_tokens.prompt_text(example.turns, len(example.turns) - 1),
        return_tensors="pt",
    )
    assert torch.equal(decoding.prepare(prompt).input_ids, inputs["input_ids"])
    pair = read_task("miniature:two-pictures", 1).prompts[0]
    assert decoding.prepare(pair).images["pixel_values"].shape == (2, 3, 96, 96)
    assert (
        decoding.prepare(pair).input_ids == miniature_tokens.IMAGE
    ).sum() == 2 * miniature_tokens.IMAGE_TOKENS
    with pytest.raises(ValueError, match="earlier turns need a chat template"):
        chat_text(ToyProcessor(), "Why?", 0, [("Who?", "Me.")])


def test_bad_lines_are_skipped_and_counted(run, toys, questions, decoded, tmp_path):
    good, lines = questions.read_text().splitlines(), [b"{", b'{"id": "\xff"}']
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    lines += [json.dumps(line).encode() for line in (
        {"id": "sky", "prompt": "Again?"}, {"id": "torn", "image": "torn.png", "prompt": "x"},
        {"id": "none", "image": "no.png", "prompt": "x"}, {"id": "long", "prompt": "x" * 250})]  # fmt: skip
    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join([good[0].encode(), *lines, good[1].encode()]))
    asked = [*ASKED[:-1], "mixed.jsonl", "--skip-bad-lines"]
    status, _, notes = run(*asked, "--out", "out")
    assert status == 0, notes
    assert "skipped bad lines: 6 of mixed.jsonl; the first: mixed.jsonl, line 2: not JSON" in notes
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["prompts"] for row in results["rows"]} == {2}
    said = " ".join(results["header"]["skipped_lines"])
    for number, reason in ((2, "not JSON"), (3, "not UTF-8"), (4, "id 'sky' was given to line 1 already"),
                           (5, "torn.png is truncated"), (6, "image file not found"),
                           (7, "the prompt has 251 tokens")):  # fmt: skip
        assert re.search(rf"mixed\.jsonl, line {number}: {reason}", said), (number, said)
    # The same prompts without their bad company are the same run.
    before = list(decoded)
    (tmp_path / "mixed.jsonl").write_text("\n".join(good[:2]))
    status, _, notes = run(*asked[:-1], "--out", "out")
    assert status == 0, notes
    assert decoded == before
    assert "skipped" not in notes

    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join(lines))
    for chosen, reason in ((lines[:2], "holds no prompts"), (lines[3:4], "has no prompt that can be asked")):
        (tmp_path / "mixed.jsonl").write_bytes(b"\n".join(chosen))
        status, _, notes = run(*asked, "--out", "new")
        assert status == 2
        assert f"error: mixed.jsonl {reason}; skipped bad lines: {len(chosen)} of mixed.jsonl" in notes
    assert not (tmp_path / "new").exists()


def test_several_values_after_one_option(run, toys, questions, tmp_path):
    asked = ("evaluate", "--target", "toy", "--draft", "near", "far", "--task", "questions.jsonl", "--limit", "1",
             "--gamma", "1", "2", "--temperature", "0", "1", "--max-new-tokens", "2")  # fmt: skip
    assert run(*asked, "--out", "out")[0] == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    ways = {(row["temperature"], row["draft"], row["shape"]) for row in rows if row["draft"]}
    assert ways == set(product((0, 1), ("near", "far"), ("chain 1", "chain 2")))
    status, _, notes = run(*asked, "--dtype", "auto", "float32")
    assert status == 2
    assert "unexpected extra argument" in notes


def test_images_and_lengths_are_checked_before_any_decoding(
    run, toys, questions, decoded, monkeypatch, tmp_path
):
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    status, _, notes = run(*ASKED, "--out", "out")
    assert status == 2
    assert "error: questions.jsonl, line 3: b.png is truncated or damaged" in notes
    Image.new("RGB", (20, 80)).save(tmp_path / "b.png")
    status, _, notes = run(*ASKED, "--out", "out")
    assert status == 2
    assert "questions.jsonl, line 3: the target's processor refuses the prompt: too tall" in notes
    (tmp_path / "token.jsonl").write_text(json.dumps({"id": "t", "prompt": "What is [IMG]?"}))
    with monkeypatch.context() as patch:
        patch.setattr(ToyProcessor, "image_token", "[IMG]")
        status, _, notes = run(*ASKED, "--task", "token.jsonl", "--limit", 1, "--out", "new")
    assert status == 2
    assert "error: token.jsonl, line 1: the prompt holds the target's own image token '[IMG]'" in notes
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "long", "prompt": "x" * 250}))
    status, _, notes = run(*ASKED, "--task", "long.jsonl", "--limit", 1, "--out", "new")
    assert status == 2
    assert (
        "long.jsonl, line 1: the prompt has 251 tokens, which with 8 new ones are more than the target's "
        "max_position_embeddings of 256" in notes
    )
    assert decoded == []


# Combinations


def test_combinations():
    made, left_out = combine(["ngram", "d"], [2], ["3,1"], [])
    assert made == [
        ("ngram", (1, 1), "target_only"),
        ("d", (1, 1), "block"),
        ("d", (3, 1), "recursive_rejection"),
    ]
    assert left_out == ["tree 3,1 of ngram: this draft proposes a chain, got a tree of 7 nodes with siblings"]
    assert [one.shape for one in made] == ["chain 2", "chain 2", "tree 3,1"]
    assert combine(["d"], [], [], [])[0] == [("d", (1,) * 5, "block")]
    both, left_out = combine(["d"], [3], ["2,2"], ["token_level", "traversal"])
    assert both == [
        ("d", (1, 1, 1), "token_level"),
        ("d", (1, 1, 1), "traversal"),
        ("d", (2, 2), "traversal"),
    ]
    assert len(left_out) == 1
    assert "use 'recursive_rejection'" in left_out[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "best"], "unknown rule 'best'; expected one of 'token_level', "),
        (["--rule", "block", "--tree", "2,2"], "rule 'block' needs a chain"),
        (["--tree", "2;2"], "tree must be branching factors by depth, such as 3,2,1, got '2;2'"),
        (["--tree", "0"], "branching factors are integers of at least 1, got 0"),
        (["--tree", "9,9,9"], "has more than 128 nodes"),
        (["--gamma", "128"], "gamma must be an integer from 0 to 127, got 128"),
        (["--gamma", "0"], "--gamma"),
        (["--gamma", "3", "--gamma", "3"], "shape of the draft 'chain 3' was given 2 times"),
        (["--gamma", "2", "--tree", "1,1"], "shape of the draft 'chain 2' was given 2 times"),
        (["--draft", "near"], "draft 'near' was given 2 times"),
        (["--task", "questions.jsonl"], "task 'questions.jsonl' was given 2 times"),
        (["--rule", "block", "--rule", "block"], "rule 'block' was given 2 times"),
        (["--temperature", "inf"], "temperature must be a finite number of at least 0"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "1", "--temperature", "1"], "temperature 1.0 was given 2 times"),
        (["--draft", "ngram", "--tree", "2"], "this draft proposes a chain"),
        (["--draft", "ngram", "--rule", "block"], "rule 'block' needs the law the draft sampled from"),
        (["--task", "no.jsonl"], "file not found: no.jsonl"),
        (["--task", "empty.jsonl"], "empty.jsonl holds no prompts"),
        (["--task", "miniature:poem"], "unknown task 'miniature:poem'; expected one of miniature:caption, "),
        (["--dtype", "int4"], "dtype must be auto, float32, bfloat16, float16, got 'int4'"),
        (["--out", "questions.jsonl"], "File exists"),
    ],
)  # fmt: skip
def test_bad_arguments_end_with_a_message(run, toys, questions, decoded, tmp_path, arguments, message):
    (tmp_path / "empty.jsonl").write_text("\n")
    asked = ("evaluate", "--target", "toy", "--draft", "near", "--task", "questions.jsonl", "--out", "out")
    status, out, notes = run(*asked, *arguments)
    assert status == 2
    assert message in re.sub(r"\s+", " ", notes.replace("│", " "))
    assert (out, decoded) == ("", [])
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_refused(run, toys, questions, monkeypatch):
    _, drafts = toys
    drafts["near"] = tiny_llama(vocab_size=1000)
    status, _, notes = run(*ASKED)
    assert status == 2
    assert "error: the draft's vocabulary has 1000 tokens and the target's 64" in notes
    monkeypatch.setattr(evaluation, "load_target", lambda models: (ToyProcessor(), tiny_llama()))
    status, _, notes = run(*ASKED)
    assert status == 2
    assert "error: target must be a LLaVA-shaped model" in notes


# What is left behind


@pytest.fixture
def results():
    """Two drafts on two tasks; the second draft's greedy text is wrong on the second task."""
    rows = []
    for name in ("a/t.jsonl", "b/u.jsonl"):
        task = Task(name, (TaskPrompt("p", "x", (), ""), TaskPrompt("q", "x", (), "")))
        ways = [PLAIN, Combination("x/one", (1, 1), "block"), Combination("x/[two]", (2, 1), "traversal")]
        wrong = [name == "b/u.jsonl" and way is ways[2] for way in ways]
        made = [
            made_run(
                prompt, way, [4, 5, int(bad)], (1,) if way is PLAIN else (1, 2, 0), 0.02, 0.5, task=name,
                finish_reason="invalid_logits" if bad else "eos",
            )
            for prompt in "pq"
            for way, bad in zip(ways, wrong, strict=True)
        ]  # fmt: skip
        rows += [summarise(task, 0.0, way, {run.key: run for run in made}) for way in ways]
    return evaluation.Results({"left_out": ["tree 2,1 of three: because"]}, rows)


def test_the_report(results, tmp_path, monkeypatch, capsys):
    from rich.console import Console

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.report(results, tmp_path, Console(width=40))
    out = capsys.readouterr().out
    # 5 tokens in 3 passes; acceptance 2/3 and 0; c = 0.1 and two draft passes; 10 tokens/s to 2.
    figures = r"1\.67 +1\.67-1\.67 +0\.67 0\.00 +1\.39 +10\.0 +5\.00 +20\.0 ms"
    assert len(re.findall(rf"^ *one +chain 2 +block +{figures} +yes *$", out, re.MULTILINE)) == 2
    assert len(re.findall(rf"^ *\[two\] +tree 2,1 +traversal +{figures} +yes *$", out, re.MULTILINE)) == 1
    assert len(re.findall(rf"^ *\[two\] +tree 2,1 +traversal +{figures} +NO *$", out, re.MULTILINE)) == 1
    assert re.search(r"^t, temperature 0 *$", out, re.MULTILINE)
    assert "left out: tree 2,1 of three: because\n" in out
    assert "NOT identical to plain decoding: b/u.jsonl, x/[two], tree 2,1, traversal: prompts p, q\n" in out
    assert "NaN or infinite logits ended 2 answers: b/u.jsonl, x/[two], tree 2,1, traversal\n" in out
    assert "plot left out: matplotlib is not installed" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json"]
    written = json.loads((tmp_path / "results.json").read_text())
    assert [row["draft"] for row in written["rows"]] == 2 * [None, "x/one", "x/[two]"]


def test_the_plot(results, tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    saved = []
    savefig = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure,
        "savefig",
        lambda self, *given, **how: saved.append(self) or savefig(self, *given, **how),
    )
    report.plot(results.rows, tmp_path / "plot.png")
    assert min(Image.open(tmp_path / "plot.png").size) > 400
    for axes, measure in zip(saved[0].axes, ("block_efficiency", "mbsu", "speedup"), strict=True):
        heights = {
            container.get_label(): [bar.get_height() for bar in container]
            for container in axes.containers
            if hasattr(container, "patches")
        }
        assert heights == {
            label: [row[measure] for row in results.rows if row["draft"] == draft]
            for label, draft in (("one chain 2 block", "x/one"), ("[two] tree 2,1 traversal", "x/[two]"))
        }
        assert [label.get_text() for label in axes.get_xticklabels()] == ["t", "u"]


def test_names_that_would_be_the_same_are_not_shortened():
    assert report._labels(["x/one", "y/one", "z/two", None, "a/t.jsonl"]) == {
        "x/one": "x/one", "y/one": "y/one", "z/two": "two", "a/t.jsonl": "t"}  # fmt: skip


def test_error_bars_are_never_negative():
    assert report.error_bars([2.0, 3.0, 1.0], [(1.5, 2.25), None, (1.25, 1.5)]) == [
        [0.5, 0, 0],
        [0.25, 0, 0.5],
    ]


# The miniature


@needs_weights
def test_the_miniature_s_tasks_and_drafts(run, tmp_path):
    from fastspec.command import chat_text

    processor = miniature.load_processor()
    for name in ("caption", "conversation", "science"):
        task = read_task(f"miniature:{name}", limit=2)
        for prompt, (picture, text) in zip(task.prompts, miniature.prompts(2, name), strict=True):
            assert chat_text(processor, prompt.text, 1) == text
            assert prompt.load_images()[0].tobytes() == picture.tobytes()

    status, _, notes = run(
        "evaluate", "--target", "miniature", "--draft", "miniature", "--draft", "miniature:base",
        "--task", "miniature:science", "--limit", 2, "--max-new-tokens", 24, "--gamma", 3, "--out", "out",
    )  # fmt: skip
    assert status == 0, notes
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    tuned, base = rows[1:]
    assert (tuned["draft"], base["draft"]) == ("miniature", "miniature:base")
    assert tuned["block_efficiency"] > base["block_efficiency"] > 1
    assert tuned["identical"]
    assert base["identical"]
    status, _, notes = run(
        "evaluate", "--target", "miniature", "--draft", "miniature:best", "--task", "miniature:science"
    )
    assert status == 2
    assert "error: unknown draft 'best'; expected one of base, chat, ft" in notes
