"""Builds kvk/array/_array.*.so with CMake from the checkout around this folder.

KVK_ARRAY_BUILD names a build folder to take it from instead.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = ROOT / "python" / "kvk" / "array"


def version() -> str:
    """KVK_VERSION_MAJOR.MINOR.PATCH of include/kvk/api.h."""
    header = (ROOT / "include/kvk/api.h").read_text(encoding="utf-8")
    return ".".join(re.findall(r"#define KVK_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header))


def tool(name: str) -> str:
    """cmake or ninja: of this environment, even if it is not activated, else of the system."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return shutil.which(name, path=path) or sys.exit(f"kvk-array: {name} is not there: pip install {name}")


class CMakeBuild(build_ext):
    """Runs CMake in a fresh temporary folder, or takes what a build folder has."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = Path(os.environ.get("KVK_ARRAY_BUILD") or Path(self.build_temp).resolve() / "cmake")
        if "KVK_ARRAY_BUILD" not in os.environ:
            shutil.rmtree(build, ignore_errors=True)  # CMake's cache may name tools that are gone
            options = ["-DKVK_BUILD_ARRAY=ON", "-DKVK_BUILD_TORCH=OFF", "-DKVK_WERROR=OFF"]
            options += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
            configure = ["-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options]
            for command in (configure, ["--build", str(build), "--target", "kvk_array"]):
                subprocess.run([tool("cmake"), *command], check=True)
        (made,) = build.glob("_array.*.so")
        shutil.copy(made, target)


class BuildPy(build_py):
    """The Python files, and the one of kvk.formats that needs no torch."""

    def run(self) -> None:
        super().run()
        target = Path(self.build_lib) / "kvk" / "array"
        shutil.copy(ROOT / "python" / "kvk" / "formats" / "quant.py", target / "_quant_format.py")
        shutil.copy(ROOT / "python" / "kvk" / "py.typed", target / "py.typed")


setup(
    version=version(),
    packages=["kvk.array"],
    package_dir={"kvk.array": os.path.relpath(PACKAGE, HERE)},
    ext_modules=[Extension("kvk.array._array", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)
