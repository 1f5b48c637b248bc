"""Builds the CUDA extension where there is nvcc; everything else stands in pyproject.toml.

The extension is torch-free (raw pointers, static CUDA runtime), so it needs neither torch nor a GPU to build,
and one build serves every torch version.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
from fastspec import environment  # noqa: E402, the variables' one home; it imports no dependencies

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
RECORD = Path("fastspec") / "build.json"


def find_nvcc():
    """Path of nvcc, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(Path(home) / "bin" / "nvcc" for home in homes if home)]
    return next((str(path) for path in candidates if path and Path(path).is_file()), None)


def find_tool(name, package, folder):
    """Path of a build tool: the one from its Python package, else the system's."""
    try:
        return str(Path(getattr(__import__(package), folder)) / name)
    except ImportError:
        return shutil.which(name) or name


def supported_architectures(nvcc):
    """Those of the default set that this nvcc can compile for."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {line.removeprefix("compute_") for line in listed.split()}
    return [arch for arch in ARCHITECTURES if arch.rstrip("a") in known]


class CMakeBuild(build_ext):
    """Configures and builds with CMake and ninja; records what was built, or why not."""

    def run(self):
        wanted, nvcc = environment.cuda_build(), find_nvcc()
        record = {"built": False}
        if wanted == "0":
            record["reason"] = "left out by FASTSPEC_CUDA=0"
        elif nvcc is None:
            record["reason"] = "nvcc was not found when fastspec was installed"
            if wanted == "1":
                raise SystemExit(f"fastspec: FASTSPEC_CUDA=1 but {record['reason']}")
        else:
            try:
                record = {"built": True, "architectures": self.build_cuda(nvcc)}
            except (subprocess.CalledProcessError, OSError, ImportError) as error:
                record["reason"] = f"the build failed when fastspec was installed: {error}"
                if wanted == "1":
                    raise SystemExit(f"fastspec: FASTSPEC_CUDA=1 but {record['reason']}") from error
        if not record["built"]:
            # What an earlier build left there would be installed, or imported, all the same.
            Path(self.get_ext_fullpath("fastspec._C")).unlink(missing_ok=True)
            print(f"fastspec: installing without the CUDA kernels: {record['reason']}", file=sys.stderr)
        target = (ROOT if self.inplace else Path(self.build_lib)) / RECORD
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record) + "\n")

    def build_cuda(self, nvcc):
        """Builds the module into place; returns the architectures."""
        import pybind11

        architectures = list(environment.cuda_archs()) or supported_architectures(nvcc)
        output = Path(self.get_ext_fullpath("fastspec._C")).resolve()
        build = Path(self.build_temp).resolve() / "cuda"
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake", "cmake", "CMAKE_BIN_DIR")
        subprocess.run(
            [
                cmake,
                "-G",
                "Ninja",
                "-S",
                str(ROOT.resolve()),
                "-B",
                str(build),
                f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'ninja', 'BIN_DIR')}",
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DFASTSPEC_CUDA_ARCHS={';'.join(architectures)}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            ],
            check=True,
        )
        subprocess.run([cmake, "--build", str(build)], check=True)
        return architectures

    def get_outputs(self):
        outputs = [str(Path(self.build_lib) / RECORD)]
        module = Path(self.get_ext_fullpath("fastspec._C"))
        return outputs + ([str(module)] if module.is_file() else [])

    def get_source_files(self):
        return ["CMakeLists.txt", *(str(path) for path in Path("csrc").iterdir())]

    def copy_extensions_to_source(self):
        """run() has already put everything in place."""


class Python(build_py):
    """Leaves out of a wheel what an in-place build left in the source tree."""

    def find_data_files(self, package, src_dir):
        return [name for name in super().find_data_files(package, src_dir) if Path(name).name != RECORD.name]


setup(
    ext_modules=[Extension("fastspec._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": Python},
)
