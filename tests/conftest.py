"""Shared switches and fixtures."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated
torch.set_num_threads(1)  # small tensors: threads only get in each other's way, and in that of other workers


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="run everything at full size")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Workers of ``-n auto``: each loads torch, so more than a few cost more than they bring."""
    return min(4, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if "slow" in item.keywords and not config.getoption("--exhaustive"):
            item.add_marker(pytest.mark.skip(reason="exhaustive; run with --exhaustive"))


@pytest.fixture(scope="session")
def exhaustive(request):
    """Whether the exhaustive suite was asked for."""
    return request.config.getoption("--exhaustive")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs ``fastspec ARGUMENTS`` in an empty folder; returns exit status, stdout and stderr."""
    from fastspec import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastspec", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as ended:
            return ended.code or 0, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run
