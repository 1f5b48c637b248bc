"""What setup.py decides, without a compiler: when the CUDA extension is built, left out, or an error."""

import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fastspec.ops import backends

setuptools = pytest.importorskip("setuptools")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def module(monkeypatch):
    """setup.py, imported without installing anything; it finds no nvcc unless a test says so."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    spec = importlib.util.spec_from_file_location("fastspec_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "find_nvcc", lambda: None)
    for name in ("FASTSPEC_CUDA", "FASTSPEC_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def build(module, tmp_path):
    """Runs build_ext into an empty folder; returns what it recorded and the files it says it made."""

    def build():
        distribution = setuptools.Distribution({"ext_modules": [setuptools.Extension("fastspec._C", [])]})
        command = module.CMakeBuild(distribution)
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
        command.ensure_finalized()
        command.run()
        record = json.loads((tmp_path / "lib" / "fastspec" / "build.json").read_text())
        return record, [Path(name).name for name in command.get_outputs()]

    return build


def failing(self, nvcc):
    raise subprocess.CalledProcessError(1, ["cmake"])


def test_without_nvcc_it_is_left_out_with_one_line(build, capfd):
    assert build() == (
        {"built": False, "reason": "nvcc was not found when fastspec was installed"},
        ["build.json"],
    )
    lines = [line for line in capfd.readouterr().err.splitlines() if "fastspec" in line]
    assert lines == [
        "fastspec: installing without the CUDA kernels: nvcc was not found when fastspec was installed"
    ]


def test_insisting_without_nvcc_is_an_error(build, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSPEC_CUDA", "1")
    with pytest.raises(SystemExit, match="FASTSPEC_CUDA=1 but nvcc was not found"):
        build()
    assert not (tmp_path / "lib").exists()


def test_a_failing_build_is_recorded(module, build, monkeypatch):
    monkeypatch.setattr(module, "find_nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.setattr(module.CMakeBuild, "build_cuda", failing)
    record, outputs = build()
    assert not record["built"]
    assert re.match(
        r"the build failed when fastspec was installed: .*cmake.* exit status 1", record["reason"]
    )
    assert outputs == ["build.json"]
    monkeypatch.setenv("FASTSPEC_CUDA", "1")
    with pytest.raises(SystemExit, match="FASTSPEC_CUDA=1 but the build failed"):
        build()


def test_a_missing_build_tool_is_a_failing_build(module, build, monkeypatch):
    monkeypatch.setattr(module, "find_nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.setitem(sys.modules, "pybind11", None)
    record, _ = build()
    assert not record["built"]
    assert re.match(r"the build failed when fastspec was installed: .*pybind11", record["reason"])
    monkeypatch.setenv("FASTSPEC_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FASTSPEC_CUDA=1 but the build failed.*pybind11"):
        build()


@pytest.mark.parametrize("wanted", ["0", "auto"])
def test_what_an_earlier_build_made_does_not_stay(module, build, monkeypatch, tmp_path, wanted):
    """A wheel takes along all that lies in the build folder, and an editable installation imports it."""

    def build_cuda(self, nvcc):
        path = Path(self.get_ext_fullpath("fastspec._C"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return ["90a"]

    monkeypatch.setattr(module, "find_nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.setattr(module.CMakeBuild, "build_cuda", build_cuda)
    record, outputs = build()
    assert record["built"]
    assert len(outputs) == 2
    monkeypatch.setenv("FASTSPEC_CUDA", wanted)
    monkeypatch.setattr(module.CMakeBuild, "build_cuda", failing)
    record, outputs = build()
    assert not record["built"]
    assert outputs == ["build.json"]
    assert [path.name for path in (tmp_path / "lib" / "fastspec").iterdir()] == ["build.json"]


def test_it_can_be_left_out_where_nvcc_is(module, build, monkeypatch):
    monkeypatch.setattr(module, "find_nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.setattr(module.CMakeBuild, "build_cuda", failing)
    monkeypatch.setenv("FASTSPEC_CUDA", "0")
    assert build()[0] == {"built": False, "reason": "left out by FASTSPEC_CUDA=0"}


@pytest.mark.parametrize(
    ("asked", "built"), [(None, ["80", "90a", "120"]), ("90a", ["90a"]), ("80,90a", ["80", "90a"])]
)
def test_architectures(module, build, monkeypatch, asked, built):
    commands = []

    def run(command, **options):
        commands.append(command)
        return types.SimpleNamespace(stdout="compute_75\ncompute_80\ncompute_90\ncompute_120\n")

    monkeypatch.setattr(module, "find_nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.setattr(module, "subprocess", types.SimpleNamespace(run=run, CalledProcessError=OSError))
    monkeypatch.setitem(sys.modules, "pybind11", types.SimpleNamespace(get_cmake_dir=lambda: "/pybind11"))
    if asked is not None:
        monkeypatch.setenv("FASTSPEC_CUDA_ARCHS", asked)
    assert build()[0] == {"built": True, "architectures": built}
    configure = next(command for command in commands if "-S" in command)
    assert f"-DFASTSPEC_CUDA_ARCHS={';'.join(built)}" in configure
    assert "-DCMAKE_CUDA_COMPILER=/cuda/bin/nvcc" in configure


def test_a_bad_value_is_an_error(build, monkeypatch):
    monkeypatch.setenv("FASTSPEC_CUDA", "yes")
    with pytest.raises(ValueError, match="FASTSPEC_CUDA must be auto, 0 or 1, got 'yes'"):
        build()


def test_nvcc_is_found_in_cuda_home(module, monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("fastspec_setup", ROOT / "setup.py")
    spec.loader.exec_module(module)  # with its own find_nvcc again
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert module.find_nvcc() == str(nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    assert module.find_nvcc() == str(nvcc)


def test_every_package_is_installed():
    listed = re.search(
        r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    packages = {
        init.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for init in ROOT.glob("fastspec/**/__init__.py")
    }
    packages |= {"fastspec.kernels"}  # a link, which a glob need not follow
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == packages
    assert (ROOT / "fastspec" / "kernels").resolve() == (ROOT / "kernels").resolve()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"built": False, "reason": "left out by FASTSPEC_CUDA=0"}, "left out by FASTSPEC_CUDA=0"),
        (None, "the compiled module was never built; install with pip to build it"),
    ],
)
def test_info_says_why_the_kernels_are_missing(monkeypatch, tmp_path, record, reason):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    if record is not None:
        (tmp_path / "build.json").write_text(json.dumps(record))
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "ops" / "backends.py"))
    monkeypatch.setattr(backends, "importlib", types.SimpleNamespace(import_module=missing))
    monkeypatch.setattr(backends, "extension", backends.extension.__wrapped__)
    monkeypatch.setattr(backends, "triton_version", lambda: None)
    cuda, triton, reference = backends.backends()
    assert cuda == ("cuda", False, reason)
    assert not triton.available
    assert reference.available
