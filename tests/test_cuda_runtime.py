"""The CUDA runtime without a card: its C++ cases over a fake driver and a fake NVRTC, the real NVRTC where there is
one, the cache between processes, and the Python side."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from kvk import _load, cuda
from kvk.cuda import Kernel

ROOT = Path(__file__).resolve().parent.parent
CPP = ROOT / "tests" / "cuda"
BUILD = ROOT / "build" / "cuda-tests"
PROBE_SOURCES = str(CPP / "include")
CASES = sorted(
    name
    for file in CPP.glob("test_*.cc")
    for name in re.findall(r"^KVK_CASE\((\w+)\)", file.read_text(), flags=re.MULTILINE)
)
ARCHS = ["sm_80", "sm_90a", "sm_100a", "sm_120a"]


def probe(template: str = "probe_kernel", n: int = 3) -> Kernel:
    return Kernel("kvk/device/probe.cuh", f"kvk::device::{template}<{n}>")


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder of the C++ test program and the fake libraries."""
    BUILD.mkdir(parents=True, exist_ok=True)
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one build for all workers of pytest-xdist
        for command in (["cmake", "-S", CPP, "-B", BUILD, "-G", "Ninja"], ["cmake", "--build", BUILD]):
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
            assert done.returncode == 0, done.stdout + done.stderr
    return BUILD


@pytest.fixture(scope="session")
def nvrtc() -> str:
    """The file of a real NVRTC that serves."""
    cuda.provide_nvrtc()
    found = cuda.info()["nvrtc"]
    if "error" in found:
        pytest.skip("no NVRTC here: pip install nvidia-cuda-nvrtc")
    return found["path"]


def environment(**changes: str) -> dict[str, str]:
    """This process's, without the variables that steer kvk except the library under test, and with `changes`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KVK_", "FAKE_"))}
    if "KVK_LIBRARY" in os.environ:
        kept["KVK_LIBRARY"] = os.environ["KVK_LIBRARY"]
    return {**kept, **changes}


PRELUDE = """
import json, torch, kvk
from kvk import cuda
from kvk.cuda import Kernel
cuda.provide_nvrtc()
def probe(n=3, template="probe_kernel"):
    return Kernel("kvk/device/probe.cuh", f"kvk::device::{template}<{n}>")
def error_of(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "no error"
"""


def start(code: str, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**changes),
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out.strip(), err


def python(code: str, **changes: str) -> tuple[str, str]:
    """What the code prints to stdout and stderr, in a process of its own."""
    return finish(start(code, **changes))


# The C++ program


@pytest.mark.parametrize("name", CASES)
def test_cpp(programs: Path, name: str) -> None:
    program = [str(programs / "kvk_test_cuda"), name]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"checks=[1-9]\d* failures=0", done.stdout)


def test_cpp_cases_are_all_listed(programs: Path) -> None:
    listed = subprocess.run(
        [str(programs / "kvk_test_cuda"), "--list"], capture_output=True, text=True
    ).stdout
    assert sorted(listed.split()) == CASES
    assert len(CASES) > 30


def test_declarations_match_nvidias_headers() -> None:
    """driver.h and nvrtc.h against NVIDIA's cuda.h and nvrtc.h, as pip or a toolkit installs them."""
    roots = [Path(name) / "nvidia" for name in sys.path if name] + [Path("/usr/local/cuda")]
    found: dict[str, Path] = {}
    for root in roots:
        for header in ("cuda.h", "nvrtc.h"):
            for path in (*root.glob(f"*/include/{header}"), *root.glob(f"include/{header}")):
                found.setdefault(header, path.parent)
    if len(found) < 2:
        pytest.skip("no cuda.h and nvrtc.h here: pip install nvidia-cuda-runtime nvidia-cuda-nvrtc")
    folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'include'}"]
    folders += [part for folder in set(found.values()) for part in ("-isystem", str(folder))]
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++20", "-fsyntax-only", *folders, str(CPP / "signatures.cc")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The library


def test_nothing_of_cuda_is_linked() -> None:
    dynamic = subprocess.run(
        ["readelf", "-d", _load.path_of_library()], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search(r"cuda|nvrtc|cublas|cudnn|nvidia", name)]


def test_import_opens_neither_driver_nor_nvrtc() -> None:
    code = "print([line.split()[-1] for line in open('/proc/self/maps') if 'libcuda.so' in line or 'libnvrtc' in line])"
    command = [sys.executable, "-c", "import kvk\n" + code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    if torch.version.cuda is None:
        assert done.stdout.strip() == "[]"
    else:  # torch itself may have opened them
        plain = [sys.executable, "-c", "import torch\n" + code]
        alone = subprocess.run(plain, capture_output=True, text=True, env=environment(), check=True)
        assert done.stdout == alone.stdout


def test_stream_lookup_finds_torch_cuda_only_where_it_is() -> None:
    assert cuda.info()["torch_cuda"] == (torch.version.cuda is not None)


def test_embedded_sources_are_those_of_the_tree() -> None:
    code = "print(json.loads(torch.ops.kvk._runtime_info())['device_sources'])"
    embedded, _ = python(code)
    tree, _ = python(code, KVK_DEVICE_SOURCES=str(ROOT / "include"))
    assert embedded == tree, "libkvk.so was built before include/kvk/device changed: make build"
    assert embedded != python(code, KVK_DEVICE_SOURCES=PROBE_SOURCES)[0]
    assert re.fullmatch("[0-9a-f]{64}", embedded)


def test_without_driver_and_nvrtc() -> None:
    code = """
found = cuda.info()
print(found["driver"]["error"], found["nvrtc"]["error"], sep="\\n")
print(error_of(lambda: cuda.compile_kernel(probe(), "sm_90a")))
print(error_of(lambda: cuda.precompile(kernels=[probe()])))
print(cuda.info_rows())
q = torch.zeros(1, 1, 32)
"""
    out, _ = python(code, KVK_LIBCUDA="/nowhere/libcuda.so.1", KVK_NVRTC="/nowhere/libnvrtc.so")
    assert "kvk: no CUDA driver: /nowhere/libcuda.so.1" in out
    assert "kvk: the NVRTC that KVK_NVRTC names does not serve:" in out
    assert "kvk: there is no card that kvk runs on" in out


def test_fake_cards_are_described(programs: Path) -> None:
    code = """
print(json.dumps(cuda.info()["driver"]))
print(cuda.info_rows()[2])
print(error_of(lambda: torch.ops.kvk._load_kernel("kvk/device/types.h", "x", 0)))
"""
    out, _ = python(code, KVK_LIBCUDA=str(programs / "libkvk_fake_cuda.so"))
    first, row, error = out.splitlines()
    card = {"capability": "9.0", "arch": "sm_90a", "num_sms": 132, "max_shared_per_block": 232448}
    assert json.loads(first) == {"cuda": "12.8", "devices": [{"name": f"Fake {i}", **card} for i in range(2)]}
    assert row == "('cuda:1', 'Fake 1, sm_90a, 132 SMs, 227 KiB shared memory')"
    if torch.version.cuda is None:
        assert error == "kvk: this torch has no CUDA (libtorch_cuda.so is not loaded)"


@pytest.mark.parametrize(("version", "arch"), [("11.8", "sm_80"), ("12.4", "sm_100a"), ("12.4", "sm_120a")])
def test_nvrtc_too_old(programs: Path, version: str, arch: str) -> None:
    out, _ = python(
        f"print(error_of(lambda: cuda.compile_kernel(probe(), {arch!r})))",
        KVK_NVRTC=str(programs / "libkvk_fake_nvrtc.so"),
        KVK_LIBCUDA="/nowhere",
        FAKE_NVRTC_VERSION=version,
        KVK_DEVICE_SOURCES=PROBE_SOURCES,
    )
    wanted = (
        "is version 11.8, kvk needs 12.0" if version == "11.8" else f"NVRTC 12.4 .* cannot compile for {arch}"
    )
    assert re.search(wanted, out)


# The real NVRTC


@pytest.fixture
def probes(nvrtc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process compiles the test kernels, into a cache of its own."""
    for name in list(os.environ):
        if name.startswith("KVK_") and name != "KVK_LIBRARY":
            monkeypatch.delenv(name)
    monkeypatch.setenv("KVK_DEVICE_SOURCES", PROBE_SOURCES)
    monkeypatch.setenv("KVK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entry(path: Path) -> tuple[bytes, bytes]:
    """(key, cubin) of a cache file; the layout stands in csrc/cuda/cubin_cache.cc."""
    magic, key, length, _, name, log, image = struct.unpack("<8s64sQ32sQQQ", path.read_bytes()[:136])
    assert magic == b"KVKCUB01"
    assert length == name + log + image == path.stat().st_size - 136
    return key, path.read_bytes()[136 + name + log :]


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_for(probes: Path, arch: str) -> None:
    done = cuda.compile_kernel(probe(n=4), arch)
    assert (done.origin, done.stack_bytes, done.spill_store_bytes, done.spill_load_bytes) == (
        "compiled",
        0,
        0,
        0,
    )
    assert 0 < done.registers <= 64
    assert done.shared_bytes == 512
    assert done.warnings == []
    assert "probe_kernel" in done.lowered_name and done.lowered_name.startswith("_Z")
    assert [path.name for path in probes.iterdir()] == [f"{done.key}.cubin"]
    key, image = entry(probes / f"{done.key}.cubin")
    assert key.decode() == done.key
    assert len(image) == done.cubin_bytes
    assert image[:4] == b"\x7fELF" and struct.unpack_from("<H", image, 18)[0] == 190  # EM_CUDA
    assert done.lowered_name.encode() in image
    again = cuda.compile_kernel(probe(n=4), arch)
    assert (again.origin, again.key, again.registers) == ("memory", done.key, done.registers)


def test_local_memory_and_spills_are_seen(probes: Path) -> None:
    local = cuda.compile_kernel(probe("local_memory_kernel", 40), "sm_90a")
    assert (local.stack_bytes, local.spill_store_bytes) == (160, 0)
    spilling = cuda.compile_kernel(probe("spilling_kernel", 96), "sm_90a")
    assert spilling.spill_store_bytes > 0 and spilling.spill_load_bytes > 0


def test_warnings_are_seen(probes: Path) -> None:
    # Two blocks of 1024 threads do not fit an SM of 12.0.
    assert "out of range" in "".join(cuda.compile_kernel(probe("spilling_kernel", 97), "sm_120a").warnings)


def test_flags_reach_the_compiler(probes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cuda.compile_kernel(probe(n=5), "sm_90a")
    monkeypatch.setenv("KVK_NVRTC_FLAGS", "-lineinfo")
    lined = cuda.compile_kernel(probe(n=5), "sm_90a")
    assert lined.key != plain.key and lined.cubin_bytes > plain.cubin_bytes
    monkeypatch.setenv("KVK_NVRTC_FLAGS", "--no-such-flag")
    with pytest.raises(
        RuntimeError, match=r"nvrtcCompileProgram failed with NVRTC_ERROR_INVALID_OPTION .*probe_kernel<5>"
    ):
        cuda.compile_kernel(probe(n=5), "sm_90a")


@pytest.mark.parametrize(
    ("kernel", "arch", "message"),
    [
        (
            probe("no_such_kernel"),
            "sm_90a",
            r"(?s)does not compile kvk::device::no_such_kernel<3> for sm_90a:.*error",
        ),
        (probe(n=3), "sm_70", "want sm_80 or later"),
        (probe(n=3), "sm_999", "cannot compile for sm_999, it knows sm_"),
        (
            Kernel("kvk/device/none.cuh", "x"),
            "sm_90a",
            "there is no device source kvk/device/none.cuh; kernel x",
        ),
    ],
)
def test_compile_errors(probes: Path, kernel: Kernel, arch: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        cuda.compile_kernel(kernel, arch)
    assert cuda.cache_files() == []


COMPILE = """
done = cuda.compile_kernel(probe(6), "sm_90a")
print(done.origin, done.key)
"""


def test_cache_serves_later_processes(nvrtc: str, tmp_path: Path) -> None:
    steer = {"KVK_DEVICE_SOURCES": PROBE_SOURCES, "KVK_CACHE": str(tmp_path), "KVK_LOG": "1"}
    out, log = python(COMPILE, **steer)
    assert out.startswith("compiled ")
    assert "kvk: compiled: kvk::device::probe_kernel<6> for sm_90a in " in log
    again, log = python(COMPILE, **steer)
    assert again == out.replace("compiled", "cache")
    assert "kvk: cache: kvk::device::probe_kernel<6> for sm_90a in " in log
    (file,) = tmp_path.iterdir()
    whole, kept = file.read_bytes(), entry(file)
    for damaged in (b"", whole[:-1], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        file.write_bytes(damaged)
        repaired, log = python(COMPILE, **steer)
        assert repaired == out
        assert f"kvk: damaged, will be made again: {file}" in log
        assert entry(file) == kept  # NVRTC repeats itself, too


def test_processes_compile_at_once(nvrtc: str, tmp_path: Path) -> None:
    steer = {"KVK_DEVICE_SOURCES": PROBE_SOURCES, "KVK_CACHE": str(tmp_path)}
    outs = [finish(process)[0] for process in [start(COMPILE, **steer) for _ in range(3)]]
    assert len({out.split()[1] for out in outs}) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".cubin"]
    assert python(COMPILE, **steer)[0].startswith("cache ")


def test_a_cache_that_cannot_be_written(nvrtc: str) -> None:
    steer = {"KVK_DEVICE_SOURCES": PROBE_SOURCES, "KVK_CACHE": "/dev/null/kvk"}
    out, log = python(COMPILE, **steer)
    assert out.startswith("compiled ")
    assert "kvk:" not in log
    out, log = python(COMPILE, **steer, KVK_LOG="1")
    assert out.startswith("compiled ")
    assert "kvk: the cache /dev/null/kvk does not take the cubin" in log


def test_threads_and_cubins_to_ship(probes: Path, tmp_path: Path) -> None:
    kernels = [probe(n=n) for n in range(20, 24)]
    done = cuda.precompile(["sm_80", "sm_90a"], kernels, jobs=3)
    assert [(one.arch, one.kernel) for one in done] == [
        (arch, kernel) for arch in ("sm_80", "sm_90a") for kernel in kernels
    ]
    assert len({one.key for one in done}) == 8
    assert len(cuda.cache_files()) == 8

    package = tmp_path / "site" / "kvk"  # a package that has them
    shutil.copytree(
        Path(cuda.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "cubins", "__pycache__")
    )
    shipped = package / "cubins"
    cuda.precompile("sm_90a", kernels[:1], output=shipped)
    assert len(list(shipped.iterdir())) == 1
    assert len(cuda.cache_files()) == 8
    code = """
print(cuda.compile_kernel(probe(20), "sm_90a").origin)
print(error_of(lambda: cuda.compile_kernel(probe(21), "sm_90a")))
"""
    steer = {
        "KVK_NVRTC": "/nowhere",
        "KVK_LIBCUDA": "/nowhere",
        "KVK_DEVICE_SOURCES": PROBE_SOURCES,
        "KVK_LIBRARY": str(_load.path_of_library()),
        "PYTHONPATH": str(package.parent),
    }
    origin, error = python(code, **steer)[0].split("\n", 1)
    assert origin == "shipped"
    assert "the NVRTC that KVK_NVRTC names" in error

    assert cuda.clear_cache() == 8
    assert cuda.cache_files() == []


# Python


def test_precompile_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for arch in ("90", "sm_9", "sm_90b", "compute_90"):
        with pytest.raises(ValueError, match="archs must be names like 'sm_80' or 'sm_90a'"):
            cuda.precompile([arch], [])
    with pytest.raises(ValueError, match="jobs must be 1 or more, got 0"):
        cuda.precompile(["sm_90a"], [], jobs=0)
    assert cuda.precompile(["sm_90a"], []) == []


def test_default_kernels() -> None:
    if hasattr(torch.ops.kvk, "_default_kernels"):
        kernels = cuda.default_kernels()
        assert kernels and len(set(kernels)) == len(kernels)
        assert all((ROOT / "include" / kernel.header).is_file() for kernel in kernels)
    else:
        with pytest.raises(RuntimeError, match="no list of CUDA kernels"):
            cuda.default_kernels()


def test_command_line(
    probes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "default_kernels", lambda: [probe(n=30), probe("local_memory_kernel", 31)])
    assert cuda.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "kvk/device/probe.cuh  kvk::device::probe_kernel<30>",
        "kvk/device/probe.cuh  kvk::device::local_memory_kernel<31>",
    ]
    assert cuda.main(["--arch", "sm_80", "sm_90a", "--match", "probe_kernel", "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["sm_80", "compiled"], ["sm_90a", "compiled"]]
    assert lines[2].startswith("2 kernels in ") and lines[2].endswith(str(probes))
    assert cuda.main(["--arch", "sm_80", "--clear", "--output", str(tmp_path / "out")]) == 0
    assert "deleted 2 kernels" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.cubin"))) == 2
    assert cuda.main(["--match", "nothing has this"]) == 2
    assert cuda.main(["--arch", "sm_1"]) == 2
    monkeypatch.setattr(cuda, "default_kernels", lambda: [probe("none")])
    assert cuda.main(["--arch", "sm_80"]) == 1
    assert "does not compile" in capsys.readouterr().err


def test_nvrtc_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "nvidia/cu13/lib": ["libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc.alt.so.13"],
        "nvidia/cuda_nvrtc/lib": ["libnvrtc.so.12"],
        "nvidia/cublas/lib": ["libcublas.so.12"],
    }
    for folder, files in names.items():
        (tmp_path / folder).mkdir(parents=True)
        for file in files:
            (tmp_path / folder / file).touch()
    toolkit = tmp_path / "toolkit" / "lib64"
    toolkit.mkdir(parents=True)
    (toolkit / "libnvrtc.so.12.4.127").touch()
    (toolkit / "libnvrtc.so.12").symlink_to("libnvrtc.so.12.4.127")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    pip12 = str(tmp_path / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
    pip13 = str(tmp_path / "nvidia/cu13/lib/libnvrtc.so.13")

    modules = set(sys.modules)

    def ours() -> list[str]:
        return [path for path in cuda.nvrtc_files() if path.startswith(str(tmp_path))]

    monkeypatch.setattr(torch.version, "cuda", None)
    assert ours()[0] == pip13
    assert len(ours()) == 3
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert ours()[-1] == pip13 and pip12 in ours()[:2]
    assert not {name for name in set(sys.modules) - modules if name.split(".")[0] == "nvidia"}
