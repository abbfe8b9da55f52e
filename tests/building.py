"""What the tests of the build share: where things are, and running commands so that a failure shows their output."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWN_VARIABLES = ("KVK_CPU_LEVEL", "KVK_LIBRARY", "KVK_TORCH_INCLUDE", "PYTHONPATH", "VIRTUAL_ENV")


def tool(name: str) -> str:
    """The program of that name: beside this Python first, then on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    assert found is not None, f"{name} is not installed"
    return found


def run(
    command: Sequence[str | Path],
    *,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 900,
) -> subprocess.CompletedProcess[str]:
    """Runs a command without the variables that steer kvk, plus `env`; with `check` it must succeed."""
    clean = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    done = subprocess.run(
        [str(part) for part in command],
        env={**clean, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode != 0:
        text = f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        raise AssertionError(text[-8000:])
    return done


def cmake_build(source: Path, build: Path, *options: str) -> None:
    """Configures and builds; what is up to date stays."""
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    run([tool("cmake"), "-S", source, "-B", build, "-G", "Ninja", ninja, *options])
    run([tool("cmake"), "--build", build])


def build_project(*options: str) -> Path:
    """Builds more of the project in build/, where `make build` has left most of its objects; the folder."""
    import torch

    folder = ROOT / "build"
    include = (Path(torch.__file__).parent / "include").resolve()
    with lock("build"):
        cmake_build(ROOT, folder, f"-DKVK_TORCH_INCLUDE={include}", *options)
    return folder


@contextmanager
def lock(name: str) -> Iterator[None]:
    """One test process at a time; the others wait."""
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    with open(folder / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
