"""The wheel: built as `pip install .` builds it, what it holds, what its library needs, and kvk installed from it."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from building import ROOT, run, tool

pytestmark = pytest.mark.xdist_group("package")  # one worker builds the wheel for all

NEEDED = {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
LOADER = re.compile(r"ld-linux.*\.so\.\d")  # may be needed too
NOT_SOURCES = (".*", "build", "dist", "__pycache__", "*.egg-info", "*.so", "*.so.*", "*.whl")
DECODE = """
import kvk, torch
q, pages = torch.ones(1, 2, 32), torch.ones(4, 3, 1, 32)
table, lens = torch.tensor([[3, 1]], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
out, lse = kvk.paged_decode(q, pages, pages / 2, table, lens)
assert torch.equal(out, torch.full((1, 2, 32), 0.5)), out
assert torch.allclose(lse, torch.tensor(32**0.5 + torch.tensor(5.0).log())), lse
"""


@dataclass
class Wheel:
    path: Path
    cpu_seconds: float


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without what was built in it."""
    folder = tmp_path_factory.mktemp("package") / "kvk"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_SOURCES, "cubins"))
    cubins = folder / "python" / "kvk" / "cubins"  # as `precompile --output` leaves them; see docs/cuda.md
    cubins.mkdir()
    (cubins / "shipped.cubin").write_bytes(b"a cubin")
    return folder


@pytest.fixture(scope="session")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """pip wheel, with build isolation, of the source distribution, in the environment of the tests, which has torch."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder], cwd=sources)
    (sdist,) = folder.glob("kvk-*.tar.gz")
    start, cpu_start = time.monotonic(), cpu_of_children()
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, sdist])
    seconds, cpu_seconds = time.monotonic() - start, cpu_of_children() - cpu_start
    (path,) = folder.glob("*.whl")
    print(
        f"\n{path.name}: {path.stat().st_size / 1e3:.0f} kB, {seconds:.0f} s, of which CPU {cpu_seconds:.0f} s"
    )
    return Wheel(path, cpu_seconds)


@pytest.fixture(scope="session")
def library(wheel: Wheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libkvk.so of the wheel."""
    folder = tmp_path_factory.mktemp("library")
    with zipfile.ZipFile(wheel.path) as archive:
        return Path(archive.extract("kvk/libkvk.so", folder))


@pytest.fixture(scope="session")
def python(wheel: Wheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that has the wheel, and torch by a .pth file."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", folder])
    python = folder / "bin" / "python"
    run([python, "-m", "pip", "install", "--no-deps", wheel.path])
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return python


def python_run(python: Path, code: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run([python, "-c", code], cwd=folder, env=env, check=False)


def api_version() -> str:
    header = (ROOT / "include" / "kvk" / "api.h").read_text()
    return ".".join(re.findall(r"KVK_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header))


def test_wheel_is_small_quick_and_for_any_python(wheel: Wheel) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.path.name == f"kvk-{api_version()}-py3-none-{platform}.whl"
    assert wheel.path.stat().st_size < 20e6
    # Three minutes on two cores, in CPU time: what else the machine does must not decide.
    assert wheel.cpu_seconds < 360


def test_wheel_holds_the_package(wheel: Wheel) -> None:
    with zipfile.ZipFile(wheel.path) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "python"
    modules = {str(path.relative_to(package)) for path in (package / "kvk").rglob("*.py")}
    modules = {name for name in modules if not name.startswith("kvk/array/")}  # of the distribution kvk-array
    assert {name for name in names if name.endswith(".py")} == modules
    assert names >= {"kvk/libkvk.so", "kvk/py.typed", "kvk/cubins/shipped.cubin"}
    assert [name for name in names if ".so" in name] == ["kvk/libkvk.so"]


def test_needs_nothing_but_torch_and_the_c_library(library: Path) -> None:
    dynamic = run([tool("readelf"), "-dW", library]).stdout
    needed = {name for name in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic) if not LOADER.fullmatch(name)}
    assert "libtorch_cpu.so" in needed and needed <= NEEDED
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    undefined = run([tool("nm"), "-D", "--undefined-only", library]).stdout
    names = [line.split()[-1] for line in undefined.splitlines()]
    assert names and not [name for name in names if name.startswith(("Py", "_Py"))]
    for prefix in ("GLIBC", "GLIBCXX", "GCC", "CXXABI"):
        versions = re.findall(rf"@{prefix}_([\d.]+)\b", undefined)
        newest = max(versions, key=lambda text: [int(part) for part in text.split(".")], default="none")
        print(f"{prefix}: {newest}")


def test_shows_one_symbol(library: Path) -> None:
    """torch needs no symbol of the library: it registers itself. One C function tells Python about the build."""
    defined = run([tool("nm"), "-D", "--defined-only", library]).stdout
    assert [line.split()[-1] for line in defined.splitlines()] == ["kvk_build_info"]


def test_keeps_to_the_stable_abi(library: Path) -> None:
    report = run([tool("torch-abi-audit"), "--check", "torch", library]).stdout
    print(report)
    assert re.search(r"Torch ABI: +STABLE\n", report)
    assert re.search(r"Min torch: +2\.10\.0\n", report)


def test_installed_wheel_runs(python: Path, tmp_path: Path) -> None:
    code = DECODE + "print(kvk.__file__)"
    done = python_run(python, code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(python.parent.parent))


def test_the_ops_without_the_python_package(python: Path, tmp_path: Path) -> None:
    """examples/python: the library of the installed wheel, and nothing of `import kvk`."""
    done = run([python, ROOT / "examples" / "python" / "sparse_decode.py"], cwd=tmp_path)
    assert done.stdout.startswith("out [1, 32, 128], 98304 bytes a page instead of 262144: 0.375")


def test_info(python: Path, tmp_path: Path) -> None:
    done = run([python, "-m", "kvk", "info"], cwd=tmp_path)
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    lines = {name: value.strip() for name, value in lines.items()}
    assert lines["kvk"] == api_version()
    assert lines["torch"] == torch.__version__
    assert Path(lines["library"]).name == "libkvk.so" and Path(lines["library"]).is_relative_to(
        python.parent.parent
    )
    assert lines["CPU level"].split()[0] in lines["CPU levels"]


def test_wrong_command(python: Path, tmp_path: Path) -> None:
    done = run([python, "-m", "kvk", "nonsense"], cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "usage: python -m kvk" in done.stderr


def test_versions_agree(python: Path, tmp_path: Path) -> None:
    code = "import kvk, importlib.metadata as m; from kvk.info import build_info;"
    code += "print(kvk.__version__, m.version('kvk'), build_info()['version'])"
    assert python_run(python, code, tmp_path).stdout.split() == [api_version()] * 3


def test_second_copy_of_the_library_is_refused(python: Path, library: Path, tmp_path: Path) -> None:
    copy = shutil.copy(library, tmp_path / "libkvk.so")
    done = python_run(python, f"from kvk import _load; _load.load({str(copy)!r})", tmp_path)
    assert done.returncode == 1
    assert "ImportError: torch.ops.kvk is already defined by " in done.stderr
    assert f"not loading {copy}" in done.stderr


def test_library_of_another_is_refused(python: Path, library: Path, tmp_path: Path) -> None:
    code = f"import torch; torch.ops.load_library({str(library)!r}); import kvk"
    done = python_run(python, code, tmp_path)
    assert done.returncode == 1
    assert "ImportError: torch.ops.kvk is already defined by another library" in done.stderr


def test_same_library_twice_is_fine(python: Path, tmp_path: Path) -> None:
    code = "from kvk import _load; _load.load(); _load.load(_load.path_of_library())" + DECODE
    done = python_run(python, code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_own_build_by_variable(python: Path, library: Path, tmp_path: Path) -> None:
    code = DECODE + "from kvk import _load; print(_load.path_of_library())"
    done = python_run(python, code, tmp_path, KVK_LIBRARY=str(library))
    assert done.stdout.strip() == str(library.resolve()), done.stderr


def test_missing_library(python: Path, tmp_path: Path) -> None:
    missing = tmp_path / "libkvk.so"
    done = python_run(python, "import kvk", tmp_path, KVK_LIBRARY=str(missing))
    assert done.returncode == 1
    assert f"ImportError: kvk: {missing} does not exist; build it with" in done.stderr


def test_broken_library(python: Path, tmp_path: Path) -> None:
    broken = tmp_path / "libkvk.so"
    broken.write_bytes(b"\x7fELF is all it has")
    done = python_run(python, "import kvk", tmp_path, KVK_LIBRARY=str(broken))
    assert done.returncode == 1
    assert str(broken) in done.stderr.splitlines()[-1]


def test_missing_torch_is_a_clear_error(sources: Path, tmp_path: Path) -> None:
    """pip install, build isolation included, in an environment without torch."""
    run([sys.executable, "-m", "venv", tmp_path / "empty"])
    python = tmp_path / "empty" / "bin" / "python"
    programs = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = os.pathsep.join(p for p in programs if not (Path(p).parent / "pyvenv.cfg").is_file())
    command = [python, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, sources]
    done = run(command, env={"PATH": path}, check=False)
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert f"kvk: no torch >= 2.10 in the environment of {python}. Install the torch you want first" in output
    assert not list(tmp_path.glob("*.whl"))
