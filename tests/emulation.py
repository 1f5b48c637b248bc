"""CUDA kernels without a GPU: verification and proposals, compiled by a C++ compiler against ``tests/emulator``.

A block's 512 threads are fibers that take turns, in an order that changes; warps, barriers and messages between blocks
are what they are on a GPU. What only a GPU can show stays with it: its memory model, its clusters, its approximate
functions.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from test_compile import ROOT, run

EMULATOR = ROOT / "tests" / "emulator"
SOURCES = (
    "csrc/verify_float.cu",
    "csrc/verify_bfloat16.cu",
    "csrc/verify_half.cu",
    "csrc/verify.cu",
    "csrc/propose.cu",
    "csrc/bindings.cpp",
    "tests/emulator/emulator.cpp",
)


def load(shared_folder: Path) -> ModuleType:
    """The module ``fastspec._C`` with emulated kernels, built by the first of the processes that share the folder.

    Skips the test where there is no C++ compiler or no pybind11.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("a C++ compiler is missing: the CUDA kernels cannot be emulated here")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is missing: pip install '.[test]'")
    folder = shared_folder / "emulated"
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    try:
        folder.mkdir()
    except FileExistsError:
        while not module.exists() and not (folder / "failed").exists():
            time.sleep(0.1)
        assert module.exists(), "another process has failed to build it"
    else:
        try:
            build(compiler, [pybind11.get_include(), sysconfig.get_path("include")], folder, module)
        except BaseException:
            (folder / "failed").touch()
            raise
    spec = importlib.util.spec_from_file_location("_C", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def build(compiler: str, include: list[str], folder: Path, module: Path) -> None:
    """Compiles the sources, two at a time, and links them."""
    # Fibers leave by longjmp, which fortified headers take for a mistake.
    options = ["-std=c++20", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", '-DFASTSPEC_ARCHITECTURES="emulated"']
    include = [f"-I{one}" for one in (EMULATOR, ROOT / "csrc", *include)]

    def compile_one(source: str) -> Path:
        product = folder / Path(source).with_suffix(".o").name
        run(
            compiler, *options, *include, "-include", "cuda_runtime.h",
            "-x", "c++", "-c", ROOT / source, "-o", product,
        )  # fmt: skip
        return product

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    run(compiler, "-shared", "-pthread", *objects, "-o", folder / "linked")
    (folder / "linked").replace(module)
