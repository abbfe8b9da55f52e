"""kvk.array: every op, bit for bit as through torch, in the caller's memory, without torch, and on CuPy's stream."""

from __future__ import annotations

import ctypes
import importlib
import inspect
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import kvk
import ml_dtypes
import numpy as np
import pytest
import test_cuda_runtime
import test_record
import torch
from building import ROOT, build_project, run, tool
from kvk import replay, saved
from kvk_testing import assert_bit_equal
from paged_cases import make_case
from test_cuda_runtime import programs  # noqa: F401  the fake driver

# Ops that are registered in torch.ops.kvk and not on arrays, and why.
NOT_ON_ARRAYS: dict[str, str] = {}


@pytest.fixture(scope="session")
def module_folder() -> Path:
    """Where _array.*.so lies: built beside the C++ tests, or where KVK_ARRAY_LIBRARY says."""
    if "KVK_ARRAY_LIBRARY" in os.environ:
        return Path(os.environ["KVK_ARRAY_LIBRARY"]).parent
    options = ("-DKVK_BUILD_TESTS=ON", "-DKVK_BUILD_ARRAY=ON")
    return build_project(*options, f"-DPython_EXECUTABLE={sys.executable}")


@pytest.fixture(scope="session")
def library(module_folder: Path) -> Path:
    (path,) = module_folder.glob("_array.*.so")
    return path


@pytest.fixture(scope="session")
def ka(library: Path) -> ModuleType:
    """kvk.array."""
    os.environ["KVK_ARRAY_LIBRARY"] = str(library)
    return importlib.import_module("kvk.array")


def as_numpy(x: torch.Tensor) -> np.ndarray:
    """The same memory; bfloat16 as ml_dtypes has it."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def as_torch(x: np.ndarray) -> torch.Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.asarray(x))


def run_on_arrays(ka: ModuleType, call: saved.SavedCall, convert=as_numpy) -> dict[str, torch.Tensor]:
    """The results of a saved call by name, as replay.run_call gives them."""
    tensors = call.tensors()
    results = getattr(ka, call.op)(**{name: convert(x) for name, x in tensors.items()}, **call.plain())
    names = [a.name for a in call.arguments if a.role == "in_out"]
    found = {name: tensors[name] for name in names}
    results = () if results is None else results if isinstance(results, tuple) else (results,)
    wanted = replay.run_call(call)
    return found | dict(
        zip([name for name in wanted if name not in found], map(as_torch, results), strict=True)
    )


def test_every_op_is_on_arrays(ka: ModuleType) -> None:
    missing = test_record.public_ops() - {name for name in ka.__all__ if callable(getattr(ka, name))}
    assert missing == set(NOT_ON_ARRAYS), (
        f"in torch.ops.kvk and not in kvk.array: {sorted(missing - set(NOT_ON_ARRAYS))}; an adapter in csrc/torch "
        "is in both faces (csrc/array/README.md), or name the op in NOT_ON_ARRAYS and say why"
    )


def test_signatures_are_those_of_torch(ka: ModuleType) -> None:
    for name in sorted(test_record.public_ops() - set(NOT_ON_ARRAYS)):
        names = [a.name for a in getattr(torch.ops.kvk, name).default._schema.arguments]
        found = list(inspect.signature(getattr(ka, name)).parameters)
        assert found[: len(names)] == names and found[-1] == "stream", name
        if name in kvk.__all__:
            typed = list(inspect.signature(getattr(kvk, name)).parameters)
            assert set(typed) <= set(found) | {"clip"}, name


def test_every_op_gives_the_bits_of_torch(ka: ModuleType, tmp_path: Path) -> None:
    with kvk.recording(dump=tmp_path):
        test_record.call_everything()
    seen = set()
    for path in sorted(tmp_path.iterdir()):
        call = saved.read_call(path)
        wanted = replay.run_call(call)
        for name, got in run_on_arrays(ka, call).items():
            assert_bit_equal(got, wanted[name], f"{call.op}: {name}")
        seen.add(call.op)
    assert seen == test_record.public_ops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["hnd", "halves", "padded"])
def test_strided_pools(ka: ModuleType, layout: str, dtype: torch.dtype) -> None:
    case = make_case([70, 3, 0], page_size=5, layout=layout, group=3, dtype=dtype, table="csr", sinks=True)
    options = {n: as_numpy(x) if isinstance(x, torch.Tensor) else x for n, x in case.options.items()}
    out, lse = ka.paged_decode(*map(as_numpy, case.args), **options)
    want = kvk.paged_decode(*case.args, **case.options)
    assert_bit_equal(as_torch(out), want[0])
    assert_bit_equal(as_torch(lse), want[1])


def test_negative_strides_are_views_too(ka: ModuleType) -> None:
    x = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    assert np.array_equal(ka.hadamard(x[::-1]), ka.hadamard(x)[::-1])


def test_in_place_is_in_place(ka: ModuleType) -> None:
    """What is written is the caller's memory, through the same pointers; what is given as out= comes back itself."""
    rng = np.random.default_rng(0)
    k_pages, v_pages = (np.zeros((6, 8, 2, 32), ml_dtypes.bfloat16) for _ in range(2))
    k, v = (rng.standard_normal((3, 2, 32)).astype(ml_dtypes.bfloat16) for _ in range(2))
    where = [x.ctypes.data for x in (k_pages, v_pages)]
    assert ka.append_kv(k, v, k_pages, v_pages, np.array([9, -1, 47])) is None
    assert [x.ctypes.data for x in (k_pages, v_pages)] == where
    assert np.array_equal(k_pages[1, 1], k[0]) and np.array_equal(v_pages[5, 7], v[2])
    assert np.count_nonzero(k_pages.astype(np.float32)) == 2 * 2 * 32
    half = np.ones((3, 8, 64), np.float16)[:, ::2, :32]  # a view with gaps
    before = half.base.copy()
    want = ka.hadamard(half)
    ka.hadamard_(half)
    assert np.array_equal(half, want)
    assert np.array_equal(half.base[:, 1::2], before[:, 1::2]) and np.array_equal(
        half.base[..., 32:], before[..., 32:]
    )
    out = np.empty((3, 4, 32), np.float16)
    assert ka.hadamard(half, out=out) is out


def test_out_needs_both(ka: ModuleType) -> None:
    parts, lse = np.ones((2, 3, 1, 8), np.float32), np.zeros((2, 3, 1), np.float32)
    out, merged = np.empty((3, 1, 8), np.float32), np.empty((3, 1), np.float32)
    results = ka.merge_states(parts, lse, merged_out=out, merged_lse=merged)
    assert results[0] is out and results[1] is merged and (out == 1).all()
    with pytest.raises(
        RuntimeError, match="kvk::merge_states: merged_out and merged_lse go together, got no merged_lse"
    ):
        ka.merge_states(parts, lse, merged_out=out)


def test_nothing_is_kept(ka: ModuleType) -> None:
    """Neither a call nor its failure keeps a reference to an array."""
    x = np.ones((4, 32), np.float32)
    ka.hadamard(x)
    before = sys.getrefcount(x)
    for _ in range(5):
        result = ka.hadamard(x)
        with pytest.raises(RuntimeError):
            ka.hadamard(x, scale=float("nan"))
    assert sys.getrefcount(x) == before
    del x
    assert result.sum() != 0


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("paged_decode", {"q": torch.randn(2, 4, 31)}),
    ("paged_decode", {"q": torch.randn(2, 3, 32)}),
    ("paged_decode", {"q": torch.randn(2, 4, 32).double()}),
    ("paged_decode", {"q": torch.randn(4, 32)}),
    ("paged_decode", {"k_pages": torch.randn(40, 16, 2, 32).transpose(2, 3)}),
    ("paged_decode", {"page_indices": torch.zeros(2, 3, dtype=torch.int64)}),
    ("paged_decode", {"page_indices": torch.full((2, 3), 40, dtype=torch.int32)}),
    ("paged_decode", {"kv_lens": torch.tensor([400, 20], dtype=torch.int32)}),
    ("paged_decode", {"sinks": torch.zeros(3)}),
    ("paged_decode", {"softmax_scale": float("inf")}),
]


@pytest.mark.parametrize(("op", "change"), WRONG)
def test_errors_are_those_of_torch(ka: ModuleType, op: str, change: dict[str, Any]) -> None:
    names = ("q", "k_pages", "v_pages", "page_indices", "kv_lens")
    arguments = {**dict(zip(names, test_record.decode_arguments(), strict=True)), **change}
    with pytest.raises(RuntimeError) as ours:
        getattr(torch.ops.kvk, op)(**arguments)
    on_arrays = {n: as_numpy(x) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    with pytest.raises(RuntimeError) as theirs:
        getattr(ka, op)(**on_arrays)
    assert str(theirs.value) == next(line for line in str(ours.value).splitlines() if "kvk::" in line)


def test_read_only_arrays_are_not_written(ka: ModuleType) -> None:
    x = np.ones((4, 32), np.float32)
    x.flags.writeable = False
    ka.hadamard(x)
    with pytest.raises(RuntimeError, match="kvk::hadamard_: x is written, and this array is read-only"):
        ka.hadamard_(x)
    with pytest.raises(RuntimeError, match="kvk::hadamard: out is written, and this array is read-only"):
        ka.hadamard(x.copy(), out=x)


def test_what_is_no_array(ka: ModuleType) -> None:
    with pytest.raises(TypeError, match="arrays that have __dlpack__, got list"):
        ka.hadamard([1.0])
    with pytest.raises(TypeError, match="missing a required argument: 'slot_mapping'"):
        ka.append_kv(*[np.ones((1, 1, 32), np.float32)] * 4)
    with pytest.raises(TypeError, match="wants an array of uint16, got float32"):
        ka.bfloat16_bits(np.ones(3, np.float32))
    with pytest.raises(AttributeError, match="no 'paged_nothing'; its ops are append_kv"):
        _ = ka.paged_nothing
    with pytest.raises(ValueError, match="count must be 0 or more"):
        ka.set_num_threads(-1)


def test_bfloat16_as_bits(ka: ModuleType) -> None:
    x = np.random.default_rng(0).standard_normal((4, 32)).astype(ml_dtypes.bfloat16)
    bits = x.view(np.uint16)
    result = ka.hadamard(ka.bfloat16_bits(bits))
    assert result.dtype == np.uint16 and np.array_equal(result, ka.hadamard(x).view(np.uint16))
    ka.hadamard_(ka.bfloat16_bits(bits))
    assert np.array_equal(bits, result)
    with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16"):
        ka.hadamard(bits)


def test_threads(ka: ModuleType) -> None:
    x = np.random.default_rng(0).standard_normal((4000, 64)).astype(np.float32)
    before, want = ka.get_num_threads(), ka.hadamard(x)
    for count in (1, 3):
        ka.set_num_threads(count)
        assert ka.get_num_threads() == count
        assert np.array_equal(ka.hadamard(x), want)
    ka.set_num_threads(0)
    assert ka.get_num_threads() == before


def test_a_format_brings_its_clips(ka: ModuleType) -> None:
    fmt = kvk.QuantFormat(32, 32, k_clip=0.8, v_clip=0.9)
    dense = [np.random.default_rng(i).standard_normal((2, 32, 1, 32)).astype(np.float32) for i in range(2)]
    pools = [np.zeros((3, 1, size), np.uint8) for size in (fmt.k_record_bytes, fmt.v_record_bytes)]
    src, dst = np.array([1], np.int32), np.array([2], np.int32)
    ka.quantize_pages(*dense, src, *pools, dst, fmt)
    wanted = fmt.new_pool(3, 1)
    kvk.quantize_pages(*map(torch.from_numpy, (*dense, src)), *wanted, torch.from_numpy(dst), fmt)
    for got, want in zip(pools, wanted, strict=True):
        assert np.array_equal(got[2], want[2].numpy())
    k, v = ka.dequantize_pages(*pools, dst, fmt, np.float16)
    assert k.dtype == v.dtype == np.float16 and k.shape == (1, 32, 1, 32)
    assert ka.dequantize_pages(*pools, dst, fmt, ml_dtypes.bfloat16)[0].dtype == ml_dtypes.bfloat16
    assert ka.dequantize_pages(*pools, dst, fmt.numbers, "float32")[0].dtype == np.float32


def test_formats_are_those_of_torch(ka: ModuleType) -> None:
    assert ka.QuantFormat is kvk.QuantFormat and ka.BitmapFormat is kvk.BitmapFormat
    fmt = ka.BitmapFormat(16, 64, 32, 64, np.float16)
    assert fmt.dtype is torch.float16 and fmt == kvk.BitmapFormat(16, 64, 32, 64, torch.float16)
    assert ka.BitmapFormat(16, 64, 32, 64, ml_dtypes.bfloat16) == kvk.BitmapFormat(16, 64, 32, 64)
    assert kvk.BitmapFormat.from_numbers(fmt.numbers) == fmt


def test_torch_is_a_producer_like_others(ka: ModuleType) -> None:
    """Through DLPack, in and out: the results are torch's tensors, the memory written is theirs."""
    x = torch.randn(4, 32).bfloat16()
    result = ka.hadamard(x)
    assert isinstance(result, torch.Tensor)
    assert_bit_equal(result, kvk.hadamard(x))
    ka.hadamard_(x)
    assert_bit_equal(x, result)


class Producer:
    """An array of a library that nobody knows, of DLPack as it was before 1.0."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.asked = array, []

    def __dlpack__(self, stream: Any = None) -> Any:
        self.asked.append(stream)
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def test_any_producer(ka: ModuleType) -> None:
    x = Producer(np.ones((4, 32), np.float32))
    result = ka.hadamard(x)
    assert isinstance(result, np.ndarray) and result[0, 0] == np.float32(32**0.5)
    assert x.asked == [None]


def test_an_array_api_library(ka: ModuleType) -> None:
    """Of a library that kvk does not know by name: read and written where it lies, results in that library."""
    import array_api_strict as xp

    k_pages, v_pages = xp.zeros((4, 16, 2, 32)), xp.zeros((4, 16, 2, 32))
    k_pages, v_pages = (xp.astype(x, xp.float32) for x in (k_pages, v_pages))
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 20, 2, 32)).astype(np.float32)
    slots = xp.asarray(np.arange(20) + 16)
    memory = np.from_dlpack(k_pages)
    assert ka.append_kv(xp.asarray(k), xp.asarray(v), k_pages, v_pages, slots) is None
    assert np.array_equal(memory[1], k[:16]) and np.shares_memory(memory, np.from_dlpack(k_pages))
    q, table, lens = rng.standard_normal((1, 4, 32)).astype(np.float32), [[1, 2]], [20]
    table, lens = np.array(table, np.int32), np.array(lens, np.int32)
    results = ka.paged_decode(xp.asarray(q), k_pages, v_pages, xp.asarray(table), xp.asarray(lens))
    wanted = ka.paged_decode(q, memory, np.from_dlpack(v_pages), table, lens)
    for got, want in zip(results, wanted, strict=True):
        assert type(got) is type(k_pages) and np.array_equal(np.from_dlpack(got), want)
    out, lse = xp.astype(xp.zeros((1, 4, 32)), xp.float32), xp.astype(xp.zeros((1, 4)), xp.float32)
    given, _ = ka.paged_decode(
        xp.asarray(q), k_pages, v_pages, xp.asarray(table), xp.asarray(lens), out=out, lse=lse
    )
    assert given is out and np.array_equal(np.from_dlpack(out), wanted[0])
    with pytest.raises(
        RuntimeError, match="kvk::hadamard: x must be float32, bfloat16 or float16, got float64"
    ):
        ka.hadamard(xp.ones((2, 8)))


def test_jax(ka: ModuleType) -> None:
    """Where JAX is installed (600 MB: not in CI): results are JAX's, and its arrays are not written."""
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((4, 32))
    result = ka.hadamard(x)
    assert isinstance(result, jax.Array) and np.array_equal(
        np.asarray(result), ka.hadamard(np.ones((4, 32), np.float32))
    )
    with pytest.raises(RuntimeError, match="kvk::hadamard_: x is written, and arrays of jaxlib cannot be"):
        ka.hadamard_(x)


def test_the_example_of_the_documentation_runs(ka: ModuleType) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "array.md").read_text(), re.DOTALL)
    exec(compile(code, "example", "exec"), {})


def test_calls_on_arrays_are_recorded(library: Path, tmp_path: Path) -> None:
    code = "import numpy, kvk.array as ka; ka.hadamard(numpy.ones((2, 8), numpy.float32))"
    path = os.pathsep.join([str(ROOT / "python"), *sys.path])
    env = {"KVK_LOG": "1", "KVK_DUMP": str(tmp_path), "KVK_ARRAY_LIBRARY": str(library), "PYTHONPATH": path}
    if "KVK_LIBRARY" in os.environ:
        env["KVK_LIBRARY"] = os.environ["KVK_LIBRARY"]
    done = run([sys.executable, "-c", code], env=env)
    assert "kvk: hadamard(x=float32[2, 8]) -> float32[2, 8] cpu" in done.stderr
    call = saved.read_call(next(tmp_path.iterdir()))
    assert_bit_equal(replay.run_call(call)["out"], kvk.hadamard(torch.ones(2, 8)))


# Without torch


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of kvk-array, unpacked."""
    folder = tmp_path_factory.mktemp("kvk-array-sdist")
    sources = folder / "sources"
    left = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("packages", "python", "include", "csrc", "cmake"):
        shutil.copytree(ROOT / name, sources / name, ignore=left)
    for name in ("CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder],
        cwd=sources / "packages" / "kvk-array",
    )
    (path,) = folder.glob("kvk_array-*.tar.gz")
    shutil.rmtree(sources)  # what comes next has the archive alone
    shutil.unpack_archive(path, folder)
    return folder / path.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def wheel(sdist: Path, module_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution kvk-array from its sdist, with the module that is built already."""
    folder = tmp_path_factory.mktemp("kvk-array")
    env = {"KVK_ARRAY_BUILD": str(module_folder)}
    run([sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", folder], cwd=sdist, env=env)
    (path,) = folder.glob("kvk_array-*.whl")
    return path


def test_the_sdist_has_what_the_module_is_built_of(sdist: Path, tmp_path: Path) -> None:
    """CMake configures it, where a missing source is an error, and knows the very sources of the checkout's build."""
    options = ("-DKVK_BUILD_ARRAY=ON", "-DKVK_BUILD_TORCH=OFF", f"-DPython_EXECUTABLE={sys.executable}")
    names = []
    for root in (sdist / "sources", ROOT):
        build = tmp_path / str(len(names))
        ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
        run([tool("cmake"), "-S", root, "-B", build, "-G", "Ninja", ninja, *options])
        inputs = run([tool("ninja"), "-C", build, "-t", "inputs", "kvk_array"]).stdout.splitlines()
        names.append({name.removeprefix(f"{root}/") for name in inputs if name.startswith(f"{root}/")})
    assert len(names[0]) > 50 and names[0] == names[1]
    for folder in ("include", "csrc"):  # headers are no inputs before the first build
        wanted = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.h*")}
        assert wanted == {
            path.relative_to(sdist / "sources") for path in (sdist / "sources" / folder).rglob("*.h*")
        }


@pytest.fixture(scope="session")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with kvk-array, NumPy and ml_dtypes, and without torch and kvk."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    for package in ("numpy", "ml_dtypes"):
        place = Path(importlib.import_module(package).__file__).parent
        for found in (place, place.with_name(f"{package}.libs")):
            if found.exists():
                (folder / found.name).symlink_to(found)
    return folder


def without_torch(site: Path, code: str) -> str:
    start = f"import sys; sys.path.insert(0, {str(site)!r})\n"
    return run([sys.executable, "-I", "-S", "-c", start + code], cwd=site).stdout


def test_wheel(wheel: Path) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"kvk_array-{kvk.__version__}-{tag}-{tag}-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        text = archive.read(metadata).decode()
    assert all(name.startswith("kvk/array/") for name in names), (
        names
    )  # nothing that the distribution kvk owns
    assert {"kvk/array/py.typed", "kvk/array/_formats/quant.py", "kvk/array/_formats/sparse.py"} <= set(names)
    assert "Requires-Dist: numpy" in text and "torch" not in "".join(re.findall("Requires-Dist: .*", text))


def test_works_without_torch(site: Path) -> None:
    code = """
import importlib.util, numpy as np, ml_dtypes, kvk.array as ka
assert importlib.util.find_spec("torch") is None and "torch" not in sys.modules
k, v = np.ones((2, 4, 16, 2, 64), np.float32).astype(ml_dtypes.bfloat16)
table, lens = np.array([[2, 0]], np.int32), np.array([20], np.int32)
out, lse = ka.paged_decode(np.ones((1, 4, 64), ml_dtypes.bfloat16), k, v, table, lens)
assert (out == 1).all() and np.allclose(lse, 8 + np.log(20)), (out, lse)
fmt = ka.QuantFormat(16, 64, k_group=16)
thin = ka.BitmapFormat(16, 64, 64, 64, dtype=np.float16)
assert thin.dtype == "float16" and thin == ka.BitmapFormat(16, 64, 64, 64, "float16")
pools = [np.zeros((3, 2, size), np.uint8) for size in (thin.k_record_bytes, thin.v_record_bytes)]
rows = np.random.default_rng(0).standard_normal((2, 1, 16, 2, 64)).astype(np.float16)
ka.compress_pages(*rows, np.array([0], np.int32), *pools, np.array([1], np.int32), thin)
k, v = ka.decompress_pages(*pools, np.array([1], np.int32), thin)
assert np.array_equal(k, rows[0]) and np.array_equal(v, rows[1])
out, _ = ka.sparse_decode(rows[0, 0, :1], *pools, np.array([[1]], np.int32), np.array([1], np.int32), thin)
assert np.array_equal(out, rows[1, 0, :1])
try:
    ka.BitmapFormat(16, 64, 64, 64, np.float32)
except ValueError as error:
    assert "dtype must be bfloat16 or float16" in str(error)
else:
    raise AssertionError
print(fmt.k_record_bytes, ka.__version__, ka.cpu_level())
"""
    printed = without_torch(site, code).split()
    assert printed[:2] == ["512", kvk.__version__]


# On a card, by the protocol: a CuPy of pretence over the fake driver of tests/cuda


class FakeDevice:
    def __init__(self, cupy: Any, index: int) -> None:
        self.cupy, self.id = cupy, index

    def __enter__(self) -> None:
        self.before, self.cupy.current = self.cupy.current, self.id

    def __exit__(self, *_: object) -> None:
        self.cupy.current = self.before


def fake_cupy() -> ModuleType:
    """What kvk.array asks of CuPy, over NumPy's memory, with a current device and a stream for each card."""
    cupy = ModuleType("cupy")
    cupy.current, cupy.made, cupy.asked = 0, [], []

    class ndarray:
        __module__ = "cupy"

        def __init__(self, array: np.ndarray, index: int = 0) -> None:
            self.array, self.dtype, self.device = array, array.dtype, FakeDevice(cupy, index)

        def view(self, dtype: str) -> Any:
            return ndarray(self.array.view(dtype), self.device.id)

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, self.device.id

        def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
            cupy.asked.append(stream)
            capsule = self.array.__dlpack__(max_version=max_version)
            pointer = ctypes.pythonapi.PyCapsule_GetPointer
            pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
            device = pointer(capsule, b"dltensor_versioned") + 32 + 8
            (ctypes.c_int32 * 2).from_address(device)[:] = [2, self.device.id]
            return capsule

    def empty(shape: Any, dtype: str) -> Any:
        cupy.made.append((tuple(shape), dtype, cupy.current))
        return ndarray(np.zeros(shape, dtype), cupy.current)

    stream = type("Stream", (), {"ptr": property(lambda self: 0x1000 + cupy.current)})
    cupy.cuda = ModuleType("cupy.cuda")
    cupy.cuda.Device = lambda index: FakeDevice(cupy, index)
    cupy.cuda.get_current_stream = stream
    cupy.ndarray, cupy.empty = ndarray, empty
    return cupy


ON_A_CARD = """
import ctypes, os, sys
import numpy as np
sys.path.insert(0, {tests!r})
import test_array
cupy = sys.modules["cupy"] = test_array.fake_cupy()
import kvk.array as ka
fake = ctypes.CDLL(os.environ["KVK_LIBCUDA"])
fake.fake_cuda_calls.restype = ctypes.c_char_p
fake.fake_cuda_set(b"devices", 2)
def launches():
    calls = fake.fake_cuda_calls().decode().splitlines()
    return [call for call in calls if call.startswith("cuLaunchKernel")]
def on(array, index=1):
    return cupy.ndarray(array, index)
rows, pool = on(np.ones((3, 2, 64), np.float16)), on(np.zeros((2, 4, 2, 64), np.float16))
ka.append_kv(rows, rows, pool, pool, on(np.array([1, 2, 3])))
(line,) = launches()
assert "append_kv_kernel<2>" in line and "device=1" in line and line.endswith("stream=0x1001"), line
assert cupy.asked == [0x1001] * 5, cupy.asked
ka.append_kv(rows, rows, pool, pool, on(np.array([1, 2, 3])), stream=0x77)
(line,) = launches()
assert line.endswith("stream=0x77"), line
bits = [ka.bfloat16_bits(on(np.zeros((2, 5, 1, 8), np.uint16), 0)), on(np.zeros((2, 5, 1), np.float32), 0)]
out, lse = ka.merge_states(*bits, stream=0)
(line,) = launches()
assert "merge_states_kernel<kvk::device::bf16>" in line and "device=0" in line and "(nil)" in line, line
assert cupy.made == [((5, 1, 8), "uint16", 0), ((5, 1), "float32", 0)], cupy.made
assert isinstance(out, cupy.ndarray) and out.dtype == np.uint16 and cupy.asked[-1] == 1
try:
    ka.append_kv(rows, rows, pool, pool, np.array([1, 2, 3]))
except RuntimeError as error:
    assert "kvk::append_kv: slot_mapping must be on cuda:1 like the other arguments, got cpu" in str(error), error
else:
    raise AssertionError
print("right")
"""


def test_cupy_by_the_protocol(ka: ModuleType, library: Path, programs: Path) -> None:  # noqa: F811
    code = ON_A_CARD.format(tests=str(Path(__file__).parent))
    changes = {
        "KVK_LIBCUDA": str(programs / "libkvk_fake_cuda_old.so"),
        "KVK_NVRTC": str(programs / "libkvk_fake_nvrtc.so"),
        "KVK_CACHE": "off",
        "KVK_ARRAY_LIBRARY": str(library),
    }
    done, _ = test_cuda_runtime.python(code, **changes)
    assert done == "right"
