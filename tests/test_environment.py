"""Environment variables: their defaults, what they take, and that a bad value is an error, never a default."""

import ast
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastspec import environment
from fastspec.images import load_image
from fastspec.ops import backends

ROOT = Path(__file__).parent.parent
CASES = {
    "FASTSPEC_BACKEND": (
        environment.backend,
        "auto",
        {"auto": "auto", "reference": "reference", "triton": "triton", "cuda": "cuda"},
        ["", "fast", "CUDA", "cuda "],
    ),
    "FASTSPEC_MAX_IMAGE_PIXELS": (
        environment.max_image_pixels,
        64_000_000,
        {"1": 1, "1000000": 1_000_000},
        ["", "0", "-5", "1e6", "many", "10.5"],
    ),
    "FASTSPEC_CUDA": (environment.cuda_build, "auto", {"auto": "auto", "0": "0", "1": "1"}, ["", "yes", "2"]),
    "FASTSPEC_CUDA_ARCHS": (
        environment.cuda_archs,
        (),
        {"": (), "90a": ("90a",), "80;90a": ("80", "90a"), "80, 120f": ("80", "120f"), "80;;": ("80",)},
        ["hopper", "sm_90", "9.0", "80;x", "a"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values(monkeypatch, name):
    read, default, values, bad = CASES[name]
    monkeypatch.delenv(name, raising=False)
    assert read() == default
    for given, meant in values.items():
        monkeypatch.setenv(name, given)
        assert read() == meant
    for given in bad:
        monkeypatch.setenv(name, given)
        with pytest.raises(ValueError, match=rf"{name} must .*, got "):
            read()


def test_no_other_module_reads_a_variable_of_ours():
    named = re.compile(r"FASTSPEC_[A-Z_]+")
    for path in [
        *ROOT.glob("fastspec/**/*.py"),
        *ROOT.glob("kernels/*.py"),
        *ROOT.glob("bench/*.py"),
        ROOT / "setup.py",
    ]:
        if path.name == "environment.py":
            assert set(named.findall(path.read_text())) == set(CASES)
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not named.fullmatch(node.value), (
                    f"{path} names {node.value}: read it in environment.py"
                )


def test_the_readme_lists_every_variable():
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| `(FASTSPEC_[A-Z_]+)`", readme, re.MULTILINE)) == set(CASES)


def test_the_image_limit_is_what_the_loader_uses(monkeypatch, tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (30, 20)).save(path)
    monkeypatch.setenv("FASTSPEC_MAX_IMAGE_PIXELS", "600")
    assert load_image(path).size == (30, 20)
    monkeypatch.setenv("FASTSPEC_MAX_IMAGE_PIXELS", "599")
    with pytest.raises(
        ValueError, match=r"30 x 20 pixels, more than the limit of 599 \(FASTSPEC_MAX_IMAGE_PIXELS\)"
    ):
        load_image(path)
    monkeypatch.setenv("FASTSPEC_MAX_IMAGE_PIXELS", "lots")
    with pytest.raises(ValueError, match="got 'lots'"):
        load_image(path)


def test_the_backend_is_what_the_operations_use(monkeypatch):
    monkeypatch.setenv("FASTSPEC_BACKEND", "reference")
    assert backends.choose("auto", torch.device("cpu"), supported=True) == "reference"
    monkeypatch.setenv("FASTSPEC_BACKEND", "fastest")
    with pytest.raises(
        ValueError, match="FASTSPEC_BACKEND must be one of auto, reference, triton, cuda, got 'fastest'"
    ):
        backends.choose("auto", torch.device("cpu"), supported=True)
