"""All kernels compile for the GPUs they are meant for, without warnings or spills; no GPU is needed for that."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_REGISTERS = 255


def build_tool(name, package, folder):
    """The tool from its Python package, else the system's; skips the test if there is neither."""
    try:
        return Path(getattr(__import__(package), folder)) / name
    except ImportError:
        found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing: pip install '.[build]'")
    return found


def nvcc():
    """Path of nvcc; skips the test if there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        pytest.skip("nvcc is missing: the CUDA kernels cannot be compiled here")
    return found


def resources(log):
    """(kernel, registers, spilled bytes, stack bytes) of each kernel in the output of ``ptxas -v``."""
    blocks = re.split(r"Compiling entry function '", log)[1:]
    for block in blocks:
        name = block.partition("'")[0]
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        # Functions that were not inlined are listed too, after the kernel that calls them.
        spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", block))
        stack = max(int(count) for count in re.findall(r"(\d+) bytes stack frame", block))
        yield name, registers, spills, stack


def run(*command):
    """Output of a command that must succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def configure(folder, architectures):
    """Prepares a strict build in the folder; returns the path of cmake. Skips the test where a tool is missing."""
    compiler = nvcc()
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is missing: pip install '.[build]'")
    cmake = build_tool("cmake", "cmake", "CMAKE_BIN_DIR")
    ninja = build_tool("ninja", "ninja", "BIN_DIR")
    run(
        cmake,
        *("-G", "Ninja", "-S", ROOT, "-B", folder),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_CUDA_COMPILER={compiler}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DFASTSPEC_CUDA_ARCHS={architectures}",
        "-DFASTSPEC_WERROR=ON",
        "-DFASTSPEC_PTXAS_REPORT=ON",
    )
    return cmake


def test_cuda_kernels_have_no_warnings_and_no_spills(tmp_path):
    log = run(configure(tmp_path, "90a"), "--build", tmp_path)
    kernels = list(resources(log))
    for stem in ("verify", "propose", "pass"):
        assert any(f"{stem}_kernel" in name for name, *_ in kernels), log
    for name, registers, spills, stack in kernels:
        assert registers <= MAX_REGISTERS, name
        assert spills == 0, f"{name} spills {spills} bytes"
        assert stack == 0, f"{name} keeps {stack} bytes in local memory"


def test_the_module_knows_its_architectures(tmp_path):
    # The list has semicolons, which mean something to CMake and to the shell.
    cmake, bindings = configure(tmp_path, "80;90a"), Path("CMakeFiles", "_C.dir", "csrc", "bindings.cpp.o")
    run(cmake, "--build", tmp_path, "--target", bindings)
    assert b"\x0080;90a\x00" in (tmp_path / bindings).read_bytes()


def test_triton_kernels_compile_without_spills(tmp_path):
    pytest.importorskip("triton", reason="triton is missing: pip install '.[triton]'")
    # The interpreter that other tests use replaces the compiler; and a cache would hide what no longer compiles.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "fastspec.kernels.aot"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split() for line in done.stdout.splitlines()[1:]]
    assert {architecture for _, architecture, *_ in table} == {"80", "90", "100"}
    assert {name.partition("/")[0] for name, *_ in table} == {"verify", "propose", "prefill"}
    assert all(spills == "0" for *_, spills, _ in table)
