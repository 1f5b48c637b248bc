"""The command line: demo, generate, info; what they print, where, and how bad arguments end."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from PIL import Image

import fastspec
from fastspec import demo, miniature

needs_weights = pytest.mark.skipif(
    not miniature.WEIGHTS.exists(),
    reason="the weights are absent; `python -m fastspec.miniature.train` makes them",
)
TARGET, DRAFT = str(miniature.WEIGHTS / "target"), str(miniature.WEIGHTS / "draft-ft")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    miniature.sample_example("caption", 11).scene.render().save(path)
    return path


def brackets_removed(marked):
    return re.sub(r"[\[\]]", "", marked)


# demo


@needs_weights
def test_demo_draws_a_picture_and_tells_drafted_tokens_apart(run, tmp_path):
    status, out, _ = run("demo")
    assert status == 0
    saved = tmp_path / "fastspec-demo.png"
    assert "fastspec-demo.png (drawn" in out
    assert min(Image.open(saved).size) >= 256
    assert miniature.sample_example("caption", 36).turns[0][0] in out

    answer = " ".join(out.split("outside\n")[1].strip().split("\n\n")[0].split("\n"))
    assert re.search(r"\[[^\[\]]+\]", answer)
    assert answer.count("[") == answer.count("]")
    assert "identical: yes" in out
    for words in ("tokens", "target passes", "acceptance by position", "MBSU", "time"):
        assert re.search(rf"^ +{words} .*\d", out, re.MULTILINE), words
    speculative, plain = map(float, re.search(r"block efficiency +([\d.]+) +([\d.]+)", out).groups())
    assert speculative > plain == 1.0
    tokens, plain_tokens = map(int, re.search(r"^ +tokens +(\d+) +(\d+)", out, re.MULTILINE).groups())
    passes, plain_passes = map(int, re.search(r"target passes +(\d+) +(\d+)", out).groups())
    # The prefill commits the first token, each plain pass one more.
    assert tokens == plain_tokens == plain_passes + 1
    assert speculative == pytest.approx((tokens - 1) / passes, abs=0.005)

    # Without its brackets the marked text is what `generate` answers.
    question = miniature.sample_example("caption", 36).turns[0][0]
    small = tmp_path / "small.png"
    miniature.sample_example("caption", 36).scene.render().save(small)
    result = run("generate", "--target", "miniature", "--image", small, "--prompt", question, "--json",
                 "--max-new-tokens", 160)  # fmt: skip
    assert brackets_removed(answer) == json.loads(result[1])["text"]


@needs_weights
def test_demo_takes_a_picture_and_a_prompt(run, picture, tmp_path):
    status, out, _ = run("demo", "--image", picture, "--prompt", "[b]How many?[/b]", "--max-new-tokens", 8)
    assert status == 0
    assert f"{picture} (yours)" in out
    assert "[b]How many?[/b]" in out  # markup of the user's is text
    assert "identical: yes" in out
    assert not (tmp_path / "fastspec-demo.png").exists()


@needs_weights
def test_demo_of_one_token_has_no_rates(run):
    status, out, _ = run("demo", "--max-new-tokens", 1)
    assert status == 0
    assert "nan" not in out
    assert re.search(r"block efficiency +- +-", out)


@needs_weights
def test_sampled_demo_promises_no_identity(run):
    status, out, _ = run("demo", "--temperature", 1, "--max-new-tokens", 24)
    assert status == 0
    assert "identical: not expected" in out


@needs_weights
def test_demo_fails_when_the_texts_differ(run, monkeypatch):
    decode = demo.decode

    def wrong(decoder, request, listen):
        timed = decode(decoder, request, listen)
        return demo.Timed([*timed.tokens[:-1], 0], timed.record, timed.seconds) if decoder.draft else timed

    monkeypatch.setattr(demo, "decode", wrong)
    status, out, _ = run("demo", "--max-new-tokens", 8)
    assert status == 1
    assert "identical: NO" in out


def test_marked_stream_brackets_runs_of_drafted_tokens(capsys):
    from rich.console import Console

    from fastspec.decoder import Commitment

    class Words:
        def decode(self, tokens, skip_special_tokens):
            return "".join([" a", " b", " c", " d", "\ufffd", "\u00e9"][token] for token in tokens).replace(
                "\ufffd\u00e9", "\u00e9"
            )

    stream = demo.MarkedStream(Console(width=80), Words())
    for tokens, drafted in (([0], 0), ([1, 2, 3], 2), ([1, 4], 1), ([5, 0], 1), ([1], 1)):
        stream(Commitment([tokens], [drafted], [0]))
    stream.close()
    assert capsys.readouterr().out == "a [b c] d [b\u00e9] a [b]\n"

    stream = demo.MarkedStream(Console(width=40), Words())
    for _ in range(30):
        stream(Commitment([[0, 1, 2]], [2], [0]))
    stream.close()
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines) == " ".join(["[a b] c"] * 30)
    assert 20 < max(map(len, lines)) <= 40


# generate


@needs_weights
def test_generate_streams_the_text_that_json_reports(run, picture):
    asked = ("generate", "--target", TARGET, "--draft", DRAFT, "--image", picture, "--prompt", "Describe it.",
             "--max-new-tokens", 24)  # fmt: skip
    status, streamed, notes = run(*asked)
    assert status == 0
    assert re.fullmatch(r"\d+ tokens in [\d.]+ s, [\d.]+ per target pass\n", notes)

    status, out, notes = run(*asked, "--json")
    assert status == 0
    assert notes == ""
    result = json.loads(out)
    assert result["text"] == streamed.strip()
    assert result["speculation"]["target_passes"] < len(result["tokens"])
    assert result["speculation"]["block_efficiency"] > 1
    assert len(result["speculation"]["acceptance_by_position"]) == 5

    # The target alone says the same.
    processor, target = miniature.load_processor(), miniature.load_target()
    inputs = miniature.prepare(processor, Image.open(picture), "Describe it.")
    alone = target.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert result["tokens"] == alone.tolist()
    assert result["finish_reason"] == ("eos" if len(alone) < 24 else "length")


@needs_weights
@pytest.mark.parametrize("draft", ["ngram", "miniature", TARGET])
def test_generate_with_any_draft(run, picture, draft):
    asked = ("generate", "--target", TARGET, "--image", picture, "--prompt", "What is it?", "--json",
             "--max-new-tokens", 16)  # fmt: skip
    texts = {json.loads(run(*asked, *chosen)[1])["text"] for chosen in ((), ("--draft", draft))}
    assert len(texts) == 1


@needs_weights
def test_generate_hands_every_argument_on(run, monkeypatch):
    from fastspec import generation

    seen = {}
    generate = generation.generate
    monkeypatch.setattr(
        generation, "generate", lambda target, **given: generate(target, **seen.setdefault("given", given))
    )
    status, _, _ = run("generate", "--target", "miniature", "--draft", "miniature", "--prompt", "x", "--gamma", 3,
                       "--rule", "token_level", "--max-new-tokens", 4, "--temperature", 0.7, "--top-k", 9,
                       "--top-p", 0.8, "--min-p", 0.01, "--repetition-penalty", 1.1, "--seed", 5, "--dtype",
                       "bfloat16", "--json")  # fmt: skip
    assert status == 0
    expected = {"gamma": 3, "rule": "token_level", "max_new_tokens": 4, "temperature": 0.7, "top_k": 9,
                "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 5, "do_sample": True}  # fmt: skip
    assert {name: seen["given"][name] for name in expected} == expected
    assert next(seen["given"]["draft"].parameters()).dtype == torch.bfloat16


@needs_weights
def test_generate_is_reproducible_by_its_seed(run):
    def text(seed):
        return run("generate", "--target", "miniature", "--draft", "miniature", "--prompt", "Describe it.",
                   "--temperature", 1, "--seed", seed, "--max-new-tokens", 24)[1]  # fmt: skip

    assert text(1) == text(1) != text(2)


@needs_weights
def test_json_of_a_single_token_has_no_nan(run):
    _, out, _ = run("generate", "--target", "miniature", "--prompt", "x", "--max-new-tokens", 1, "--json")
    speculation = json.loads(out, parse_constant=pytest.fail)["speculation"]
    assert speculation["block_efficiency"] is None
    assert speculation["mbsu"] is None


@needs_weights
def test_nothing_is_ever_downloaded(run, monkeypatch):
    from fastspec import command

    asked = []

    def watched(loader):
        def load(name, **arguments):
            asked.append(arguments.get("local_files_only"))
            return loader(name, **arguments)

        return load

    for loader in (
        "AutoConfig",
        "AutoProcessor",
        "AutoTokenizer",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
    ):
        kind = getattr(command, loader)
        monkeypatch.setattr(kind, "from_pretrained", watched(kind.from_pretrained))
    status, _, _ = run(
        "generate", "--target", TARGET, "--draft", DRAFT, "--prompt", "x", "--max-new-tokens", 2
    )
    assert status == 0
    assert len(asked) >= 5
    assert all(asked)


# info and help


def test_info_lists_versions_and_backends(run):
    status, out, _ = run("info")
    assert status == 0
    assert out.startswith(f"fastspec {fastspec.__version__} at ")
    assert re.search(rf"torch +{re.escape(metadata.version('torch'))}\n", out)
    for backend in ("cuda", "triton", "reference"):
        assert re.search(rf"^backend {backend} +(on|off) +\S", out, re.MULTILINE)

    facts = json.loads(run("info", "--json")[1])
    assert [backend["name"] for backend in facts["backends"]] == ["cuda", "triton", "reference"]
    assert facts["backends"][-1]["available"]
    assert bool(facts["gpus"]) == torch.cuda.is_available()


def test_info_warns_of_the_other_project_with_this_name(run, monkeypatch):
    from fastspec import info

    version = info._version
    monkeypatch.setattr(info, "_version", lambda name: "9.9" if name == "fastspec" else version(name))
    assert "warning: the unrelated distribution 'fastspec' 9.9 is installed" in run("info")[1]


def test_help_names_the_commands_and_imports_no_torch():
    code = (
        "import sys; from fastspec import cli; sys.argv = ['fastspec', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as ended: sys.exit(ended.code or 3 * ('torch' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    for command in ("demo", "generate", "info"):
        assert re.search(rf"\b{command}\b", done.stdout)


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["demo", "--gamma", "0"], "--gamma"),
        (["demo", "--temperature", "-1"], "--temperature"),
        (["demo", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["demo", "--speed", "9"], "No such option: --speed"),
        (["generate", "--prompt", "x"], "Missing option '--target'"),
        (["generate", "--target", "miniature"], "Missing option '--prompt'"),
        (["generate", "--target", "miniature", "--prompt", "x", "--top-p", "2"], "--top-p"),
        (["generate", "--target", "miniature", "--prompt", "x", "--dtype", "int4"],
         "error: dtype must be auto, float32, bfloat16, float16, got 'int4'"),
        (["generate", "--target", "miniature", "--prompt", "x", "--image", "no.png"],
         "error: image file not found: no.png"),
        (["generate", "--target", "miniature", "--prompt", "x", "--device", "tpu"],
         "error: device must be cpu, cuda or cuda:INDEX, got 'tpu'"),
        (["generate", "--target", "someone/llava", "--prompt", "x"],
         "error: cannot load the target 'someone/llava': no such directory, and not complete in the local hub cache"),
        (["generate", "--target", ".", "--prompt", "x"], "error: cannot load the target from .: "),
        (["demo", "--image", "no.png"], "error: image file not found: no.png"),
    ],
)  # fmt: skip
def test_bad_arguments_end_with_a_message(run, arguments, message):
    status, out, err = run(*arguments)
    assert status == 2
    assert message in re.sub(r"\s+", " ", err.replace("│", " "))
    assert "Traceback" not in err
    assert "answer" not in out


@needs_weights
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft", "no/draft"], "error: cannot load the draft 'no/draft': no such directory"),
        (["--draft", "."], "error: cannot load the draft from .: "),
        (["--draft", "miniature", "--rule", "best"], "error: unknown rule 'best'; expected one of 'token_level', "),
        (["--max-new-tokens", "5000"], "the target's max_position_embeddings is 1024"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_models_ends_with_a_message(run, arguments, message):
    status, out, err = run("generate", "--target", "miniature", "--prompt", "x", *arguments)
    assert status == 2
    assert message in err
    assert out == ""


@needs_weights
def test_demo_says_where_it_cannot_save(run):
    status, _, err = run("demo", "--save", "no/such/folder/picture.png")
    assert status == 2
    assert re.match(r"error: .*no/such/folder/picture\.png", err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(run):
    status, _, err = run("demo", "--device", "cuda")
    assert status == 2
    assert err == "error: device 'cuda' was asked for, but torch finds no NVIDIA GPU\n"
