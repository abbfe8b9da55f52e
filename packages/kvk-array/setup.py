"""Builds kvk/array/_array.*.so with CMake from the checkout around this folder, or from what its sdist holds of that.

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
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "sources"  # of the checkout, in an sdist
ROOT = SOURCES if SOURCES.exists() else HERE.parents[1]
NEEDED = (
    "CMakeLists.txt",
    "LICENSE",
    "cmake",
    "csrc",
    "include",
    "python/kvk/array",
    "python/kvk/formats",
    "python/kvk/py.typed",
)
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


def copy(source: Path, target: Path) -> None:
    """A file or a folder, without what builds and runs leave there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "*.py[cod]", "*.so")
        shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


class BuildPy(build_py):
    """The Python files, and kvk.formats, which needs no torch."""

    def run(self) -> None:
        super().run()
        target = Path(self.build_lib) / "kvk" / "array"
        copy(ROOT / "python" / "kvk" / "formats", target / "_formats")
        copy(ROOT / "python" / "kvk" / "py.typed", target / "py.typed")


class SDist(sdist):
    """This folder, and in sources/ what it needs of the checkout."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, [name for name in files if not name.startswith(os.pardir)])
        for name in NEEDED:
            copy(ROOT / name, Path(base_dir) / "sources" / name)
        copy(ROOT / "LICENSE", Path(base_dir) / "LICENSE")


setup(
    version=version(),
    packages=["kvk.array"],
    package_dir={"kvk.array": os.path.relpath(PACKAGE, HERE)},
    ext_modules=[Extension("kvk.array._array", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy, "sdist": SDist},
)
