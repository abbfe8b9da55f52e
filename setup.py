"""Builds libkvk.so with CMake and packs it beside the Python files.

torch is no build requirement: its headers are looked up as files in the environment that kvk is built for, and the
library links against a stub (cmake/torch_face.cmake). Metadata is in pyproject.toml, the version in include/kvk/api.h.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libkvk.so"
MARKER = Path("torch/include/torch/csrc/stable/library.h")


def version() -> str:
    """KVK_VERSION_MAJOR.MINOR.PATCH of include/kvk/api.h."""
    header = (ROOT / "include/kvk/api.h").read_text(encoding="utf-8")
    return ".".join(re.findall(r"#define KVK_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header))


def site_folders() -> Iterator[str]:
    """Where torch may lie, the likeliest first.

    Under pip's build isolation sys.path shows only the build requirements, while sysconfig and site still name the
    environment of the running interpreter. uv builds in an environment of its own; the target is on PATH when it is
    activated.
    """
    yield from sys.path
    yield from (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    yield from site.getsitepackages()
    if site.ENABLE_USER_SITE:
        yield site.getusersitepackages()
    for programs in os.environ.get("PATH", "").split(os.pathsep):
        if (Path(programs).parent / "pyvenv.cfg").is_file():
            yield from map(str, Path(programs).parent.glob("lib*/python3*/site-packages"))


def torch_include() -> Path:
    """The folder torch/include: $KVK_TORCH_INCLUDE, or that of the torch in the target environment."""
    named = os.environ.get("KVK_TORCH_INCLUDE")
    if named:
        return Path(named).resolve()
    for folder in dict.fromkeys(site_folders()):
        if (Path(folder) / MARKER).is_file():
            return (Path(folder) / "torch/include").resolve()
    sys.exit(
        f"kvk: no torch >= 2.10 in the environment of {sys.executable}. Install the torch you want first (a CPU or a "
        "CUDA build), then kvk, which uses its headers; or set KVK_TORCH_INCLUDE to a folder torch/include. uv builds "
        "in an environment of its own: activate yours, or say --no-build-isolation."
    )


def tool(name: str) -> str:
    """cmake or ninja: of this environment, even if it is not activated, else of the system."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    return found or sys.exit(f"kvk: {name} is not there: pip install {name}")


class CMakeBuild(build_ext):
    """Runs CMake: in build/, kept and incremental, for a checkout in use; in a fresh temporary folder for a wheel."""

    def run(self) -> None:
        self.kept = self.inplace
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        if not any(shutil.which(compiler.split()[0]) for compiler in compilers):
            sys.exit(f"kvk: no C++ compiler ({', '.join(compilers)}). On Debian or Ubuntu: apt install g++")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" if self.kept else Path(self.build_temp).resolve() / "cmake"
        options = [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DKVK_TORCH_INCLUDE={torch_include()}"]
        if not self.kept:
            shutil.rmtree(build, ignore_errors=True)  # CMake's cache may name tools that are gone
            options += ["-DKVK_WERROR=OFF"]  # a user's newer compiler may warn of more
        for command in (
            ["-S", ROOT, "-B", build, "-G", "Ninja", *options],
            ["--build", build, "--target", "kvk_torch"],
            ["--install", build, "--component", "python", "--prefix", target],
        ):
            subprocess.run([tool("cmake"), *map(str, command)], check=True)


class AnyPythonWheel(bdist_wheel):
    """py3-none-<platform>: the library has no Python symbols."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    version=version(),
    ext_modules=[Extension(f"kvk.{Path(LIBRARY).stem}", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
