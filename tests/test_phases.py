"""What a pass's clock says becomes rows of results, and those a table of where the time goes."""

import json

import pytest
import torch

from bench import attention, draft, engine, linear, passes, phases, table
from bench.report import write
from bench.setup import Setup
from fastspec.model.passes import ModulePass

START = 1_700_000_000_123_456_789  # nanoseconds, as a GPU counts them
HEADER = {
    "gpu": "CPU",
    "driver": "1",
    "torch": "2",
    "clocks": {"sm": "1980 MHz"},
    "read_bandwidth_tbs": 2.0,
    "commit": "abc",
}


class ClockedPass(ModulePass):
    """Notes times as the fused pass does: steps of layer 0 take 1, 11, ... 41 µs, of layer 1 2, 12, ... 42 µs.

    The embedding takes half a microsecond and the head 70. Every third pass takes twice as long, and the first ones,
    which are to warm up, a hundred times.
    """

    clock = None
    calls = 0

    def __call__(self, *tensors):
        if self.clock is not None:
            slow = 100 if self.calls < phases.WARM_UP else 2 if self.calls % 3 == 0 else 1
            layers = self._transformer.num_layers
            steps = [10_000 * step + 1000 * (layer + 1) for layer in range(layers) for step in range(5)]
            spans = torch.tensor([500, *steps, 70_000]) * slow
            self.clock.copy_(START + torch.cat((torch.zeros(1, dtype=torch.int64), spans.cumsum(0))))
            self.calls += 1
        return super().__call__(*tensors)


@pytest.fixture
def clocked(monkeypatch):
    monkeypatch.setattr(engine, "make_pass", ClockedPass)
    return Setup(1e12, quick=True, target="small")


def measured(module, setup):
    rows = module.measure(setup)
    assert len({row["name"] for row in rows}) == len(rows)
    return {row["name"]: row for row in rows}


def test_a_pass_has_rows_of_its_phases(clocked):
    rows = measured(passes, clocked)
    size = clocked.dtype.itemsize
    expected = {  # microseconds each, bytes of them, how often
        "embedding": (0.5, 6 * 256 * size, 1),
        "qkv": (1.5, 3 * 256 * 256 * size, 2),
        "attention": (11.5, 2 * 24 * 256 * size, 2),
        "output": (21.5, 256 * 256 * size, 2),
        "gate_up": (31.5, 2 * 256 * 512 * size, 2),
        "down": (41.5, 256 * 512 * size, 2),
        "head": (70.0, 256 * 512 * size, 1),
    }
    for name, batch_size in (("pass/small/rows6/ctx24", 1), ("pass/small/batch8/rows6/ctx24", 8)):
        found = {row: rows[row] for row in rows if row.startswith(name + "/")}
        assert list(found) == [f"{name}/{phase}" for phase in expected]
        for phase, (microseconds, num_bytes, times) in expected.items():
            row = found[f"{name}/{phase}"]
            num_bytes *= batch_size if phase in ("embedding", "attention") else 1
            assert (row["us"], row["times"]) == (microseconds, times)
            assert row["p10"] == microseconds < row["p90"]
            assert row["megabytes"] == pytest.approx(num_bytes / 1e6, abs=5e-4)
            assert row["tbs"] == pytest.approx(num_bytes / microseconds * 1e-6, abs=5e-4)
            # At a terabyte per second.
            assert row["share_of_floor"] == pytest.approx(row["tbs"], abs=1e-3)


def test_the_draft_has_rows_of_its_phases(clocked):
    rows = measured(draft, clocked)
    assert "target_model" not in vars(clocked)  # it takes seconds, and nothing needs it
    found = {
        name.rpartition("/")[2]: row for name, row in rows.items() if "times" in row and "rows1/" in name
    }
    assert {phase: row["us"] for phase, row in found.items()} == {
        "embedding": 0.5,
        "qkv": 1.0,
        "attention": 11.0,
        "output": 21.0,
        "gate_up": 31.0,
        "down": 41.0,
        "head": 70.0,
    }
    assert found["attention"]["megabytes"] == pytest.approx(
        2 * (24 - 4) * 128 * clocked.dtype.itemsize / 1e6, abs=5e-4
    )


def test_linear_layers_and_attention_are_phases(clocked):
    rows = measured(linear, clocked)
    names = {"qkv": 1.5, "output": 21.5, "gate_up": 31.5, "down": 41.5, "head": 70.0}
    assert {name: row["us"] for name, row in rows.items()} == {
        f"linear/{name}/rows{count}": us for count in (1, 6, 16, 64) for name, us in names.items()
    }
    assert all(row["ratio"]["cublas"] > 0 for row in rows.values())
    rows = measured(attention, clocked)
    for count in (1, 6, 64):
        row = rows[f"attention/kv80/rows{count}"]
        other = rows[f"baseline/attention/kv80/rows{count}/torch_sdpa"]
        assert row["us"] == 11.5
        assert row["tbs"] == pytest.approx(2 * 80 * 256 * clocked.dtype.itemsize / 11.5e6, abs=5e-4)
        assert row["ratio"]["torch_sdpa"] == pytest.approx(other["us"] / 11.5, abs=0.01)


def test_the_clock_is_off_again(clocked):
    work = engine.make_work(clocked, clocked.transformer, 1, 24, 25)
    with torch.no_grad():
        assert phases.phase_timings(work, 2) is not None
        assert work.run.clock is None
        unclocked = work._replace(run=ModulePass(work.transformer, work.cache, work.mask))
        assert phases.phase_timings(unclocked, 2) is None
        assert phases.phase_rows(clocked, "pass/x", unclocked) == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("module", "name"), [(passes, "pass/small/rows16/ctx24"), (draft, "draft/small/rows6")]
)
def test_phases_fill_the_fused_pass(module, name):
    rows = measured(module, Setup(3e12, quick=True, target="small"))
    inside = [row for row in rows.values() if row["name"].rpartition("/")[0] == name]
    assert len(inside) == len(phases.STEPS) + 2
    whole = rows[name].get("us", 1e3 * rows[name].get("ms", 0))
    assert 0.2 < sum(row["times"] * row["us"] for row in inside) / whole < 1.5


def phase(name, microseconds, megabytes, times):
    return {"name": name, "us": microseconds, "megabytes": megabytes, "times": times, "share_of_floor": 0.5}


ROWS = [
    {"name": "pass/a/rows1", "ms": 0.1},
    phase("pass/a/rows1/gate_up", 20.0, 30.0, 3),
    phase("pass/a/rows1/head", 25.0, 40.0, 1),
    {"name": "baseline/pass/a/rows1/other", "ms": 0.2},
    {"name": "pass/b/rows1", "us": 50.0},
    phase("pass/b/rows1/head", 40.0, 60.0, 1),
    {"name": "pass/c/rows1", "us": 50.0},
]
TABLE = """\
`pass/a/rows1`

|  | times | MB | µs | TB/s | of the read bandwidth | µs in all | of them beyond the bytes |
|---|---:|---:|---:|---:|---:|---:|---:|
| gate, up | 3 | 30.0 | 20.0 | 1.50 | 75% | 60.0 | 15.0 |
| head | 1 | 40.0 | 25.0 | 1.60 | 80% | 25.0 | 5.0 |
| launch and end | 1 |  | 15.0 |  |  | 15.0 | 15.0 |
| the pass | 1 | 130.0 | 100.0 | 1.30 | 65% | 100.0 | 35.0 |
"""


def test_the_table_says_where_the_time_goes(tmp_path, capsys):
    path = write("pass", HEADER, ROWS, tmp_path)
    table.main([str(path), "pass/a/rows1"])
    origin, _, shown = capsys.readouterr().out.partition("\n\n")
    assert shown == TABLE
    assert all(text in origin for text in ("CPU", "1980 MHz", "2.0 TB/s", "commit abc"))
    table.main([str(path)])
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("`")] == [
        "`pass/a/rows1`",
        "`pass/b/rows1`",
    ]


@pytest.mark.parametrize(
    ("rows", "asked", "message"),
    [
        (ROWS, ["pass/c/rows1"], "got pass/c/rows1 (there: pass/a/rows1, pass/b/rows1)"),
        (ROWS[1:], [], "got pass/a/rows1 (there: pass/a/rows1, pass/b/rows1)"),
        (ROWS[-1:], [], "got none (there: none)"),
    ],
)
def test_a_table_needs_phases(rows, asked, message, tmp_path, capsys):
    path = write("pass", HEADER, rows, tmp_path)
    with pytest.raises(SystemExit):
        table.main([str(path), *asked])
    assert message in capsys.readouterr().err


def test_a_table_needs_results(tmp_path, capsys):
    odd = ([], None, {"header": HEADER, "rows": [1]}, {"header": [], "rows": ROWS})
    for text in (None, "no JSON", json.dumps({"rows": ROWS}), *map(json.dumps, odd)):
        path = tmp_path / "pass.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(SystemExit):
            table.main([str(path)])
        assert str(path) in capsys.readouterr().err
