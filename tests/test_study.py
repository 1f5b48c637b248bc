"""The study: kinds of words, where drafts were not followed, and a page that says what is on record."""

import pytest
import torch

from bench.study import __main__ as command
from bench.study import claims, measure, page
from bench.study.kinds import kinds_of, pieces, tally, verdicts
from bench.study.page import DOCS, PAGE, RECORD, read_record, write_page
from fastspec import miniature
from fastspec.runs import Run

needs_weights = pytest.mark.skipif(
    not miniature.WEIGHTS.exists(),
    reason="the weights are absent; `python -m fastspec.miniature.train` makes them",
)


def made_run(token_ids, drafted, gamma=3):
    return Run("t", "1", 0.0, "d", (1,) * gamma, "block", 0, 1, tuple(token_ids), drafted, 1, 1, (0,), 0.1,
               "eos", 0.1, 0.1)  # fmt: skip


def test_kinds_of_words():
    tokens = ["A", " big", " gre", "en", " star", " sits", " in", " the", " lower", " left", ".", "</s>"]
    assert kinds_of(tokens) == [
        "function word", "size", "colour", "colour", "shape", "other word", "function word", "function word",
        "place", "place", "mark", "end"]  # fmt: skip
    for text, kind in (
        ("rhombuses", "shape"), ("plus sign", "shape"), ("navy", "colour"), ("pale grey", "colour"),
        ("chequered", "texture"), ("stripes", "texture"), ("underneath", "place"), ("left-hand", "place"),
        ("three", "number"), ("12", "number"), ("No", "verdict"), ("picture", "other word"),
        ("whereas", "other word"), ("I", "function word"), ("tiny", "size"),
    ):  # fmt: skip
        assert kinds_of([text]) == [kind], text
    assert kinds_of(["The", " answer", " is", " B", ".", " (", "C", ")"])[3::3] == ["verdict", "verdict"]
    assert kinds_of(["A", " box", ".", " A", " ring"])[3] == "function word"


def test_where_a_draft_was_not_followed():
    # The prefill's token; two foreseen, then a miss; three foreseen and the target's own; a miss; the end foreseen.
    run = made_run(range(10), "0" + "110" + "1110" + "0" + "1")
    assert verdicts(run) == [None, True, True, False, True, True, True, None, False, True]


@needs_weights
def test_a_tally_by_hand():
    tokenizer = miniature.load_processor().tokenizer
    ids = tokenizer(" A red star.", add_special_tokens=False)["input_ids"] + [2]
    run = made_run(ids, "0" + "0" + "1" * (len(ids) - 2), gamma=9)
    texts = pieces(run, tokenizer)
    assert "".join(texts) == " A red star.</s>"
    assert texts[-1] == "</s>"
    assert tally([run, run], tokenizer) == {"colour": (2, 2), "shape": (0, 2), "mark": (0, 2), "end": (0, 2)}


def test_the_page_says_what_is_on_record():
    record = read_record()
    assert (DOCS / PAGE).read_text("utf-8") == write_page(record), "python -m bench.study.page renews it"
    asked = {
        (row["task"], row["temperature"], row["draft"], row["shape"], row["rule"]) for row in record["rows"]
    }
    for task in measure.TASK_NAMES:
        for draft in measure.PAPER_DRAFTS:
            for shape in ("chain 3", "chain 5"):
                assert (task, 0.0, draft, shape, "block") in asked
                assert {(task, 1.0, draft, shape, rule) for rule in measure.CHAIN_RULES} <= asked
            assert (task, 0.0, draft, "tree 3,2,1", "recursive_rejection") in asked
            assert {(task, 1.0, draft, "tree 3,2,1", rule) for rule in measure.TREE_RULES} <= asked
    assert all(row["identical"] for row in record["rows"] if row["temperature"] == 0)
    for example in record["examples"]:
        assert (DOCS / claims.example_name(example["task"])).is_file()
    assert (DOCS / RECORD).stat().st_size < 120_000


@needs_weights
def test_the_target_on_record_is_the_one_that_comes_along():
    from fastspec.evaluation import fingerprint

    assert read_record()["header"]["target"] == fingerprint(miniature.load_target())


def test_too_few_prompts_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), "--prompts", "1"])
    assert "--prompts must be at least 2" in capsys.readouterr().err


@pytest.mark.slow
@needs_weights
def test_the_whole_study_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    command.main(["--out", str(tmp_path), "--quick"])
    torch.set_num_threads(threads)
    record = read_record(tmp_path)
    assert (tmp_path / PAGE).read_text("utf-8") == write_page(record)
    assert {row["draft"] for row in record["rows"]} >= {None, "base", "chat", "ft", "image", "twin", "ft-256"}
    assert all(row["identical"] for row in record["rows"] if row["temperature"] == 0)
    assert (tmp_path / page.BARS).is_file()
