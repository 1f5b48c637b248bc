"""Every benchmark of the engine runs at toy size, and writes what all results have in common."""

import importlib.util
import json
import math

import pytest
import torch

from bench import training as bench_training
from bench.__main__ import main
from bench.baselines import transformers_pass
from bench.engine import make_pass
from bench.exact import Answer, answers, compare, fingerprint, make_requests, margin_over
from bench.planted import planted_law, planted_target
from bench.report import print_table, result_row
from bench.setup import Setup
from bench.timing import Timing, in_turn, summary
from fastspec import DraftTree, SpeculativeDecoder
from fastspec.model.transformer import DecodeTransformer
from fastspec.model.vision import text_stack
from fastspec.sampling import SamplingParams
from fastspec.training.sizes import parse_size

HEADER = {"gpu", "driver", "cuda", "torch", "triton", "commit", "clocks", "read_bandwidth_tbs"}
ROWS = {
    "pass": (
        *(f"pass/small/rows{rows}/ctx24" for rows in (1, 6, 16, 64)),
        "pass/small/batch8/rows6/ctx24",
        "baseline/pass/small/batch8/rows6/ctx24/transformers_graph",
    ),
    "draft": ("draft/small/rows1", "baseline/draft/small/rows6/transformers_graph"),
    "linear": ("linear/qkv/rows16", "linear/head/rows64"),
    "attention": ("attention/kv80/rows6", "baseline/attention/kv80/rows64/torch_sdpa"),
    "prefill": ("prefill/small/image4+text64/first_token",),
    "cycle": (
        "cycle/small+small/chain5/batch1/ctx24",
        "baseline/cycle/small+small/chain5/batch1/ctx24",
        "host/small+small/chain5/batch1/ctx24",
        "parts/small+small/chain5/batch1/ctx24/commit",
        "speedup/small+small/chain5/agreement0.75/greedy",
    ),
    "exact": (
        "exact/small+small/greedy/chain5/batch8",
        "exact/small+small/greedy/tree16/batch1",
        "exact/small+small/invariant/tree16/batch8",
    ),
}


@pytest.mark.parametrize("question", ROWS)
def test_results_of_each_question(question, tmp_path):
    pytest.importorskip("triton")
    main([question, "--quick", "--target", "small", "--out", str(tmp_path), "--commit", "abc"])
    (path,) = tmp_path.glob(f"*/{question}-small.json")
    results = json.loads(path.read_text())
    assert set(results["header"]) == HEADER
    assert results["header"]["commit"] == "abc"
    rows = {row["name"]: row for row in results["rows"]}
    assert len(rows) == len(results["rows"])
    assert set(ROWS[question]) <= set(rows)
    if question == "exact":
        for row in rows.values():
            assert row["equal_prompts"] == row["prompts"] >= 2
            assert row["equal_tokens"] == row["tokens"] == 24 * row["prompts"]
            assert row["divergences"] == []
            if torch.cuda.is_available():  # where the fused pass gives every row of logits its own bits
                assert row["equal_logits"] == row["tokens"]
        return
    for name, row in rows.items():
        assert ("us" in row) != ("ms" in row)
        if not name.endswith("/gaps"):
            time = row.get("us", row.get("ms"))
            assert 0 < row["p10"] <= time <= row["p90"]
        if name.startswith((f"{question}/", "speedup/")):
            assert all(ratio > 0 for ratio in row.get("ratio", {"": 1}).values())
    if question == "cycle":
        name = "speedup/small+small/chain5/agreement{}/greedy"
        assert rows[name.format(0)]["tau"] == 1
        assert 1 < rows[name.format(0.75)]["tau"] < rows[name.format(1)]["tau"] == 6


@pytest.mark.parametrize("limit", [("--steps", 12), ("--steps", 10**6, "--minutes", 0.0)])
def test_a_training_is_measured_and_ends_in_time(limit, tmp_path):
    pytest.importorskip("triton")
    asked = [
        "--target",
        "small",
        "--batch-size",
        2,
        "--length",
        32,
        "--documents",
        24,
        *limit,
        "--commit",
        "abc",
    ]
    bench_training.main([str(word) for word in [*asked, "--out", tmp_path]])
    (path,) = tmp_path.glob("*/training-small.json")
    results = json.loads(path.read_text())
    (row,) = results["rows"]
    assert row["steps"] == (12 if limit[1] == 12 else bench_training.LEAST_STEPS)
    assert results["header"]["product_rate_tflops"] > 0
    assert row["tokens_per_second"] > 0
    assert 0 < row["share_of_product_rate"] < 1
    weights = bench_training.num_multiplied(parse_size(bench_training.SIZES["small"]), 512)
    assert row["tflops"] == pytest.approx(6e-12 * weights * row["tokens_per_second"], abs=0.01)
    assert row["hours_for_the_recipe"] == pytest.approx(600e9 / row["tokens_per_second"] / 3600, rel=1e-3)
    steps = [point["step"] for point in row["acceptance"]]
    assert steps[0] == 0
    assert steps[-1] == row["steps"]
    if importlib.util.find_spec("matplotlib"):
        path.with_suffix(".svg").unlink()
        bench_training.main(["--plot", str(path)])
        assert "million tokens" in path.with_suffix(".svg").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without a GPU")
@pytest.mark.parametrize("arguments", [["pass"], ["verify", "--target", "small"], ["all"]])
def test_without_a_gpu_only_toys_run(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "need an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tree", "batch_size"),
    [(DraftTree.chain(0), 1), (DraftTree.kary((3, 2, 1)), 1), (DraftTree.kary((3, 2, 1)), 3)],
)
def test_the_engine_and_its_baseline_do_the_same_work(tree, batch_size):
    model = planted_target("small", planted_law("small"), "cpu", torch.float32)
    mask = tree.on("cpu").mask
    tokens = torch.randint(3, 500, (batch_size, tree.num_nodes))
    transformer = DecodeTransformer(*text_stack(model))
    ours = make_pass(transformer, transformer.new_cache(batch_size, 32), mask)
    theirs = transformers_pass(*text_stack(model), 0, 32, mask, batch_size)
    prefix = torch.zeros(batch_size, dtype=torch.int64)
    logits = ours(tokens, prefix)
    for _ in range(2):  # the second call starts where the first did
        torch.testing.assert_close(theirs(tokens), logits, rtol=1e-4, atol=1e-4)
    last = ours(tokens, prefix, prefix + tree.num_nodes - 1)
    torch.testing.assert_close(last[:, 0], logits[:, -1])


def test_answers_that_part():
    plain = [Answer([1, 2, 3], [10, 20, 30]), Answer([4, 5], [40, 50]), Answer([6], [60])]
    other = [Answer([1, 2, 3], [10, 21, 30]), Answer([4, 7], [40, 50]), Answer([8], [60])]
    asked = []

    def margin(*arguments):
        asked.append(arguments)
        return 0.25

    assert compare(plain, other, margin) == {
        "prompts": 3,
        "equal_prompts": 1,
        "tokens": 6,
        "equal_tokens": 4,
        "equal_logits": 3,
        "divergences": [
            {"prompt": 1, "position": 1, "margin": 0.25},
            {"prompt": 2, "position": 0, "margin": 0.25},
        ],
    }
    assert asked == [(1, 1, 7), (2, 0, 8)]


def test_numbers_tell_bits_apart():
    logits = torch.randn(2, 3, 40)
    other = logits.clone()
    other[1, 2, 7] = other[1, 2, 7].nextafter(torch.tensor(9.0))
    assert (fingerprint(logits) != fingerprint(other)).nonzero().tolist() == [[1, 2]]


def test_the_margin_is_that_of_the_token_said():
    setup = Setup(1.0, target="small")
    (request,) = make_requests(setup, 1, 6, SamplingParams(temperature=0.0))
    plain = SpeculativeDecoder(setup.target_model, None, capacity=80)
    (answer,) = answers(plain, [request])
    assert len(answer.tokens) == len(answer.logits) == 6
    for position, token in enumerate(answer.tokens):
        assert margin_over(plain, request, position, token) == 0
        # The likeliest successor has at least twice the mass of any other.
        assert margin_over(plain, request, position, 0) > math.log(2) - 0.1


def test_a_table_has_rows_with_and_without_times(capsys):
    print_table(
        [result_row("a/b", Timing(1.0, 1.0, 1.0), tau=2.5), {"name": "c", "prompts": 3, "found": [1]}]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["a/b", "1.000", "us", "1.000", "1.000", "tau", "2.500"]
    assert lines[2].split() == ["c", "prompts", "3", "found", "[1]"]


def test_a_row():
    row = result_row(
        "a/b", Timing(2000.0, 1000.0, 4000.0), 500.0, {"other": Timing(5000.0, 0.0, 0.0)}, unit="ms",
        num_bytes=4 * 10**9, tau=math.pi,
    )  # fmt: skip
    assert row == {
        "name": "a/b",
        "ms": 2.0,
        "p10": 1.0,
        "p90": 4.0,
        "tbs": 2.0,
        "share_of_floor": 0.25,
        "ratio": {"other": 2.5},
        "tau": 3.142,
    }


def test_spread_lies_within_the_samples():
    assert summary([1.0, 3.0]) == Timing(2.0, pytest.approx(1.2), pytest.approx(2.8))


def test_in_turn():
    call = in_turn([lambda: "a", lambda: "b"])
    assert [call() for _ in range(3)] == ["a", "b", "a"]
