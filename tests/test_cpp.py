"""The C++ face: its tests at every instruction-set level, natively and on emulated older CPUs; what the objects of a
level may hold; the CMake package; the headers."""

from __future__ import annotations

import platform
import re
import shutil
import signal
from pathlib import Path

import kvk
import pytest
import torch
from building import ROOT, build_project, cmake_build, run, tool
from kvk import replay

LEVELS = ["x86-64-v2", "x86-64-v3", "x86-64-v4"]
PROGRAMS = ["errors", "merge", "paged", "quant", "sweep", "threads"]
HEADERS = sorted(path.name for path in (ROOT / "include" / "kvk").glob("*.h"))
COMPILERS = [compiler for compiler in ("g++", "clang++") if shutil.which(compiler)]

# Instructions that came with AVX or later. Those with a v in front are encoded with VEX or EVEX, bar a few that system
# code alone has; the others are BMI, LZCNT and MOVBE. tzcnt is left out: older machines run it as bsf, and GCC knows.
NEWER = re.compile(
    r"%[yz]mm|\s(v(?!err\b|erw\b|mcall\b|mfunc\b)[a-z0-9]+|andn|bextr|bls(i|r|msk)|bzhi|mulx|pdep|pext|rorx|sarx|shlx"
    r"|shrx|lzcnt|movbe|k(and|or|xor|mov|test|shift|unpck)[a-z]*)\s"
)

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels are those of x86-64")


@pytest.fixture(scope="session")
def build() -> Path:
    """The C++ tests and both libraries."""
    return build_project("-DKVK_BUILD_TESTS=ON")


def program(build: Path, name: str) -> Path:
    return build / "tests" / "cpp" / name


def native_levels(build: Path) -> list[str]:
    """The levels this machine has: what the error for a wrong one lists."""
    done = run([program(build, "kvk_test_errors")], env={"KVK_CPU_LEVEL": "none"}, check=False)
    assert done.returncode == 2
    assert "KVK_CPU_LEVEL asks for 'none'; this build has on this machine: " in done.stderr
    return done.stderr.strip().split("machine: ")[1].split(", ")


@x86_only
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("level", LEVELS)
def test_native(build: Path, level: str, name: str) -> None:
    if level not in native_levels(build):
        pytest.skip(f"this machine has no {level}")
    done = run([program(build, f"kvk_test_{name}")], env={"KVK_CPU_LEVEL": level})
    assert f"level={level}\n" in done.stdout
    assert " failures=0\n" in done.stdout


@x86_only
def test_best_level_is_the_default(build: Path) -> None:
    best = native_levels(build)[0]
    assert native_levels(build) == [level for level in reversed(LEVELS) if level <= best]
    assert f"level={best}\n" in run([program(build, "kvk_test_errors")]).stdout


def emulated(cpu: str, command: list[str | Path], *, check: bool = True) -> tuple[int, str]:
    """(status, output) of a command on an emulated CPU; a signal gives its negative number."""
    qemu = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if qemu is None:
        pytest.skip(
            "no emulator: install Debian's qemu-user (apt install qemu-user) to test the lower levels"
        )
    done = run([qemu, "-cpu", cpu, *command], check=check)
    return done.returncode, done.stdout


@x86_only
def test_emulated_older_cpu_is_older(build: Path) -> None:
    """The emulator refuses AVX2 on a Nehalem, so the next test means something."""
    status, _ = emulated("Nehalem", [program(build, "kvk_avx2_probe")], check=False)
    assert status in (-signal.SIGILL, 128 + signal.SIGILL)


@x86_only
@pytest.mark.parametrize(
    "arguments", [["errors"], ["merge"], ["paged", "quick"]], ids=lambda arguments: arguments[0]
)
@pytest.mark.parametrize(("cpu", "level"), [("Nehalem", "x86-64-v2"), ("Haswell", "x86-64-v3")])
def test_emulated(build: Path, cpu: str, level: str, arguments: list[str]) -> None:
    if level == "x86-64-v3":
        status, _ = emulated(cpu, [program(build, "kvk_avx2_probe")], check=False)
        if status != 0:
            pytest.skip("this qemu does not emulate AVX2; 7.2 and later do")
    _, output = emulated(cpu, [program(build, f"kvk_test_{arguments[0]}"), *arguments[1:]])
    assert f"level={level}\n" in output
    assert " failures=0\n" in output


def newer_instructions(objects: list[Path]) -> list[str]:
    """The disassembled lines with an instruction or a register of AVX or later."""
    text = run([tool("objdump"), "-d", "--no-show-raw-insn", *objects]).stdout
    assert text.count("<") > 100, "nothing was disassembled"
    return [line for line in text.splitlines() if NEWER.search(line + " ") and line.startswith(" ")]


@x86_only
def test_no_newer_instruction_outside_its_level(build: Path) -> None:
    """The base level's object, and all code that runs before a level is chosen, keep to x86-64-v2."""
    objects = [build / "kvk_level_base.o"]
    for target in ("kvk_objects", "kvk_torch"):
        objects += sorted((build / "CMakeFiles" / f"{target}.dir").rglob("*.o"))
    assert len(objects) > 8
    assert newer_instructions(objects) == []


@x86_only
def test_newer_levels_use_what_they_may(build: Path) -> None:
    """The check above would see it: AVX2's registers in v3, AVX-512's in v4."""
    v3 = newer_instructions([build / "kvk_level_x86_64_v3.o"])
    v4 = newer_instructions([build / "kvk_level_x86_64_v4.o"])
    assert any("%ymm" in line for line in v3) and not any("%zmm" in line for line in v3)
    assert any("%zmm" in line for line in v4)


@x86_only
@pytest.mark.parametrize("level", ["base", "x86_64_v3", "x86_64_v4"])
def test_a_level_shows_its_table_alone(build: Path, level: str) -> None:
    """No inline function of a level is visible to the linker, which could merge it with another level's."""
    symbols = run(
        [tool("nm"), "--extern-only", "--defined-only", build / f"kvk_level_{level}.o"]
    ).stdout.split()
    assert symbols[2::3] == [f"kvk_cpu_kernels_{level}"]


@pytest.fixture(scope="session")
def prefix(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ library as it is installed."""
    prefix = tmp_path_factory.mktemp("installed") / "prefix"
    run([tool("cmake"), "--install", build, "--component", "cpp", "--prefix", prefix])
    return prefix


def library_folder(prefix: Path) -> Path:
    return next(prefix.rglob("libkvk_core.so")).parent


def test_cmake_package(prefix: Path, tmp_path: Path) -> None:
    """examples/cpp finds the installed package, compiles without a warning and runs."""
    assert not list(prefix.rglob("libtorch*")) and not list(prefix.rglob("libkvk.so"))
    flags = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"
    cmake_build(ROOT / "examples" / "cpp", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}", flags)
    output = run([tmp_path / "build" / "decode"]).stdout
    # Three keys of equal score sqrt(32): the mean of their values, and sqrt(32) + log 3.
    assert re.fullmatch(r"kvk \d+\.\d+\.\d+, \S+: out 0\.5, lse 6\.7555\n", output)
    needed = run([tool("readelf"), "-d", tmp_path / "build" / "decode"]).stdout
    assert "libkvk_core.so.0" in needed and "torch" not in needed


def test_every_function_records_itself() -> None:
    """Calls from C++ are logged and saved as those of the other faces are (csrc/core/describe.cc)."""
    headers = "".join((ROOT / "include" / "kvk" / name).read_text() for name in HEADERS)
    functions = set(re.findall(r"KVK_API void (\w+)\(const \w+Args& args,\s*const Context&", headers))
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "core").glob("*.cc"))
    recorded = set(re.findall(r'record::Scope recorded\("(\w+)"', sources))
    assert len(functions) >= 16 and functions == recorded


def test_names_of_the_library(prefix: Path) -> None:
    """libkvk_core.so -> .so.0 -> .so.0.1.0: the file has the version, the soname what programs depend on."""
    folder, version = library_folder(prefix), kvk.__version__
    links = {path.name: path.resolve().name for path in folder.glob("libkvk_core.so*")}
    file = f"libkvk_core.so.{version}"
    assert links == dict.fromkeys(["libkvk_core.so", "libkvk_core.so.0", file], file)
    dynamic = run([tool("readelf"), "-d", folder / file]).stdout
    assert re.findall(r"\(SONAME\).*\[(.*)\]", dynamic) == ["libkvk_core.so.0"]
    undefined = run([tool("nm"), "-D", "--undefined-only", folder / file]).stdout
    assert "torch" not in undefined and "Py" not in undefined


@pytest.mark.parametrize("compiler", COMPILERS)
def test_pkg_config(prefix: Path, compiler: str, tmp_path: Path) -> None:
    """The flags that pkg-config gives build and run the example, with every warning an error."""
    folder = library_folder(prefix)
    env = {"PKG_CONFIG_PATH": str(folder / "pkgconfig")}
    program = shutil.which("pkg-config") or shutil.which("pkgconf")
    if program is None:  # what it would print, from the file itself
        lines = dict(re.findall(r"^(\w+)=(.*)$", (folder / "pkgconfig" / "kvk.pc").read_text(), re.MULTILINE))
        assert lines["prefix"] == str(prefix)
        flags = ["-std=c++20", f"-I{prefix / 'include'}", f"-L{folder}", "-lkvk_core"]
    else:
        assert run([program, "--modversion", "kvk"], env=env).stdout.strip() == kvk.__version__
        flags = run([program, "--cflags", "--libs", "kvk"], env=env).stdout.split()
    source, made = ROOT / "examples" / "cpp" / "decode.cc", tmp_path / "decode"
    run([compiler, "-Wall", "-Wextra", "-Werror", source, *flags, f"-Wl,-rpath,{folder}", "-o", made])
    assert "out 0.5, lse 6.7555" in run([made]).stdout


@pytest.fixture(scope="session")
def engine(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/cpp_engine, built against the installed package."""
    folder = tmp_path_factory.mktemp("engine")
    flags = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"
    cmake_build(ROOT / "examples" / "cpp_engine", folder, f"-DCMAKE_PREFIX_PATH={prefix}", flags)
    return folder


def test_engine(engine: Path, tmp_path: Path) -> None:
    """A decode loop, its result held against its own computation in double; its calls recorded."""
    env = {"KVK_LOG": "1", "KVK_DUMP": str(tmp_path / "dump"), "KVK_DUMP_CALLS": "200"}
    done = run([engine / "engine"], env=env)
    assert re.fullmatch(
        r"200 steps of 4 requests at \S+: 9\.0 bits an element in full pages, .*\n", done.stdout
    )
    log = done.stderr.splitlines()
    assert sum(line.startswith("kvk: quant_decode(q=float32[4, 8, 64]") for line in log) == 200
    assert sum(line.startswith("kvk: append_kv(") for line in log) == 200
    packed = sum(line.startswith("kvk: quantize_pages(") for line in log)
    assert packed == 200 // 32 + 155 // 32 + 110 // 32 + 65 // 32  # no two requests fill a page at once
    files = sorted((tmp_path / "dump").iterdir())
    assert len(files) == 200
    some = [
        next(file for file in reversed(files) if op in file.name)
        for op in ("append_kv", "quantize", "decode")
    ]
    assert replay.main([str(file) for file in some]) == 0


def test_engine_on_a_card(engine: Path) -> None:
    """The same loop with a stream and memory of the CUDA runtime; the emulator has what it queues (test_engine.cc)."""
    if not (engine / "engine_cuda").exists():
        pytest.skip("CMake finds no CUDA toolkit to build examples/cpp_engine/cuda.cc with")
    done = run([engine / "engine_cuda"], check=False)
    if torch.cuda.is_available():
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(r"200 steps of 4 requests on cuda:0: 9\.0 bits .*\n", done.stdout)
    else:
        assert (done.returncode, done.stderr) == (77, "engine_cuda: no CUDA card here\n")


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone(header: str, compiler: str, tmp_path: Path) -> None:
    source = tmp_path / "alone.cc"
    source.write_text(f'#include "kvk/{header}"\n#include "kvk/{header}"\nint main() {{}}\n')
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    run([compiler, *flags, "-I", ROOT / "include", source])
