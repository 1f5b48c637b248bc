"""The picture of a cycle shows the kernels of a trace where they ran, and the gaps between them."""

import json
from xml.etree import ElementTree

import pytest
import torch

from bench.trace import Kernel, describe, gaps, main, read_trace, split

SVG = "{http://www.w3.org/2000/svg}"


def cycle(start):
    """Kernels of a cycle with a chain of two: name, microseconds, and the gap before."""
    parts = [
        ("at::native::clamp", 2, 1.0),
        ("void fastspec::(anonymous namespace)::pass_kernel<__nv_bfloat16, 2>(...)", 150, 1.0),
        ("fastspec::(anonymous namespace)::propose_kernel(...)", 10, 1.5),
        ("void fastspec::(anonymous namespace)::pass_kernel<__nv_bfloat16, 2>(...)", 150, 1.0),
        ("fastspec::(anonymous namespace)::propose_kernel(...)", 10, 1.5),
        ("void fastspec::(anonymous namespace)::pass_kernel<__nv_bfloat16, 2>(...)", 5000, 1.0),
        ("fastspec::(anonymous namespace)::verify_kernel(...)", 14, 1.2),
        ("fastspec::(anonymous namespace)::compact_kernel(...)", 3, 1.1),
        ("fastspec::(anonymous namespace)::commit_kernel(...)", 4, 0.9),
        ("Memcpy DtoH (Device -> Pinned)", 1, 0.8),
    ]
    kernels = []
    for name, length, gap in parts:
        kernels.append(Kernel(name, start + gap, start + gap + length))
        start = kernels[-1].end
    return kernels


def trace(tmp_path, kernels):
    events = [
        {"ph": "X", "cat": "gpu_memcpy" if "Memcpy" in name else "kernel", "name": name, "ts": start}
        | {"dur": end - start}
        for name, start, end in reversed(kernels)
    ]
    events += [{"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0.0, "dur": 9e9}]
    events += [{"ph": "M", "name": "process_name"}]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    return path


@pytest.fixture
def kernels():
    """The end of a cycle, two whole ones, and the beginning of another."""
    found = cycle(0.0)[5:]
    for _ in range(2):
        found += cycle(found[-1].end)
    return found + cycle(found[-1].end)[:3]


def test_a_trace_falls_into_whole_cycles(tmp_path, kernels):
    read = read_trace(trace(tmp_path, kernels))
    assert [kernel.name for kernel in read] == [kernel.name for kernel in kernels]
    first, second = split(read)
    assert len(first.kernels) == len(second.kernels) == 10
    expected = ["the rest", *["draft passes", "propose"] * 2, "target pass", "verify", "commit", "commit"]
    assert first.parts == second.parts == [*expected, "the rest"]
    assert first.kernels[-1].end < second.kernels[0].start


def test_gaps_are_where_nothing_runs():
    overlapping = [
        Kernel("a", 0, 5),
        Kernel("b", 1, 3),
        Kernel("c", 4, 8),
        Kernel("d", 10, 11),
        Kernel("e", 11, 12),
    ]
    assert gaps(overlapping) == [(8, 10)]


def test_a_cycle_in_words(kernels):
    first, second = split(kernels)
    words = describe(first, second)
    # 5,344 µs of work and eleven microseconds of gaps, the one before the next cycle included.
    assert words.startswith("a cycle: 5355 µs, 10 kernels and copies")
    assert "11.0 µs in all (0.21%), 1.5 µs at most" in words


def test_the_picture(tmp_path, kernels, capsys):
    out = tmp_path / "cycle.svg"
    main(["--out", str(out), "--trace", str(trace(tmp_path, kernels))])
    assert "written" in capsys.readouterr().out
    svg = ElementTree.parse(out)
    titles = [title.text for title in svg.iter(f"{SVG}title")]
    assert (
        sum("5000.00 µs" in title for title in titles) == 3
    )  # both passes above, the end of the first below
    shown = [text.text for text in svg.iter(f"{SVG}text")]
    # The seam: verify, compact, commit, copy, clamp, pass.
    assert [text for text in shown if text in ("1.2", "1.1", "0.9", "0.8")] == ["1.2", "1.1", "0.9", "0.8"]
    for rectangle in svg.iter(f"{SVG}rect"):
        if rectangle.get("x"):
            assert (
                100
                <= float(rectangle.get("x"))
                <= float(rectangle.get("x")) + float(rectangle.get("width"))
                <= 961
            )


def test_a_trace_without_cycles(tmp_path, kernels, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "x.svg"), "--trace", str(trace(tmp_path, kernels[:8]))])
    assert "the trace holds 1 whole cycles" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without a GPU")
def test_recording_needs_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "x.svg")])
    assert "recording needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_recorded_cycle_has_all_its_kernels(tmp_path, capsys):
    out = tmp_path / "cycle.svg"
    main(["--out", str(out), "--target", "small"])
    shown = [text.text for text in ElementTree.parse(out).iter(f"{SVG}text")]
    assert {"draft passes", "propose", "target pass", "verify", "commit"} <= set(shown)
    assert "a cycle: " in capsys.readouterr().out
