"""The pages say what is so: every file has its line, the README's example runs, its tables are complete."""

import re
from pathlib import Path

import pytest
from PIL import Image

from fastspec import generation, miniature
from fastspec.verification import Rule

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SOURCES = (".py", ".cu", ".cuh", ".cpp", ".h")


def test_every_file_has_its_line_in_the_architecture():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"^\| `([^`]+)` \| \S", page, re.MULTILINE)
    assert len(named) == len(set(named))
    assert [name for name in named if not (ROOT / name).is_file()] == []
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("fastspec", "kernels", "csrc", "bench", "tests", "docs")
        for path in (ROOT / folder).rglob("*")
        # fastspec/kernels is a link to kernels.
        if path.suffix in SOURCES and not path.is_relative_to(ROOT / "fastspec" / "kernels")
    }
    assert there - set(named) == set()


def test_links_lead_to_files():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            # Results are written by the benchmarks, on a GPU.
            if not link.startswith(("https://", "bench/results")):
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_readme_lists_every_rule():
    listed = re.findall(r"^\| `([a-z_]+)` \|", README, re.MULTILINE)
    assert listed == [rule.value for rule in Rule]


def test_the_readme_lists_what_is_refused():
    refused = re.search(r"^\| refused \| (.*) \|$", README, re.MULTILINE)[1]
    for name, *_ in generation._UNSUPPORTED:
        assert f"`{name}" in refused, name


@pytest.mark.skipif(
    not miniature.WEIGHTS.exists(),
    reason="the weights are absent; `python -m fastspec.miniature.train` makes them",
)
def test_the_readme_s_example_runs(monkeypatch, tmp_path, capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    for name, ours in (
        ("llava-hf/llava-1.5-7b-hf", str(miniature.WEIGHTS / "target")),
        ("JackFram/llama-68m", str(miniature.WEIGHTS / "draft-ft")),
        ('"cuda"', '"cpu"'),
        ("max_new_tokens=200", "max_new_tokens=8"),
    ):
        assert name in example
        example = example.replace(name, ours)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (96, 96), "red").save("picture.jpg")
    exec(compile(example, "README.md", "exec"), {})
    assert "What is in the picture? ASSISTANT:" in capsys.readouterr().out
