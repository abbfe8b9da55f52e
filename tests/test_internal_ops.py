"""torch.ops.kvk._*: the ops that the Python side calls, by themselves (docs/adding-an-op.md)."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import kvk
import pytest
import torch
from building import ROOT
from test_cuda_runtime import (  # noqa: F401  the fake NVRTC, the real one, and a cache of one's own
    nvrtc,
    probe,
    probes,
    programs,
    python,
)

OPS = torch.ops.kvk


def test_all_are_documented() -> None:
    names = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("kvk::_")
    }
    text = (ROOT / "docs" / "adding-an-op.md").read_text()
    listed = set(re.findall(r"^\| `(_\w+)", text, re.MULTILINE)) | set(re.findall(r", `(_\w+)` \|", text))
    assert names == listed


def test_between_explain_begin_and_end_calls_are_noted_and_not_run() -> None:
    x = torch.randn(5, 64)
    out = torch.full_like(x, 7.0)
    OPS._explain_begin(0, 0, 0)
    OPS.hadamard.out(x, out=out)
    OPS.hadamard.out(x, out=out)
    steps = json.loads(OPS._explain_end())
    assert (
        len(steps) == 2 and steps[0]["level"] == kvk.explain("hadamard", x, measure=False).steps[0]["level"]
    )
    assert (out == 7.0).all()
    OPS.hadamard.out(x, out=out)
    assert (out != 7.0).any()
    assert OPS._explain_end() == "[]"  # without a begin


def test_explain_begin_forgets_what_was_noted() -> None:
    x = torch.randn(5, 64)
    OPS._explain_begin(0, 0, 0)
    kvk.hadamard(x)
    OPS._explain_begin(0, 0, 0)
    assert json.loads(OPS._explain_end()) == []


def test_explaining_is_the_threads_own() -> None:
    x = torch.randn(5, 64)
    out = torch.full_like(x, 7.0)
    OPS._explain_begin(0, 0, 0)
    other = threading.Thread(target=lambda: OPS.hadamard.out(x, out=out))
    other.start()
    other.join()
    assert json.loads(OPS._explain_end()) == [] and (out != 7.0).any()


def test_nvrtc_is_the_first_candidate_that_serves(programs: Path) -> None:  # noqa: F811
    fake = str(programs / "libkvk_fake_nvrtc.so")
    code = f"""
torch.ops.kvk._set_nvrtc_candidates(["/nowhere/libnvrtc.so.13", {fake!r}])
print(json.loads(torch.ops.kvk._runtime_info())["nvrtc"]["path"])
"""
    found = python(code, KVK_LIBCUDA="/nowhere")[0]
    assert found == fake or torch.version.cuda is not None  # which may have an NVRTC in the process already


def test_compiled_kernels_are_shipped_and_found(probes: Path, tmp_path: Path) -> None:  # noqa: F811
    """Into a folder: compiled whatever the cache has. From a folder that is named: taken before the cache is asked."""
    kernel, folder = probe(n=7), str(tmp_path / "shipped")
    first = json.loads(OPS._compile_kernel(kernel.header, kernel.expression, "sm_90a", folder))
    assert first["origin"] == "compiled" and first["cubin_bytes"] > 0 and first["registers"] > 0
    assert [path.name for path in Path(folder).iterdir()] == [f"{first['key']}.cubin"]
    assert not probes.exists() or not list(probes.iterdir())
    code = f"""
torch.ops.kvk._set_shipped_cubins({folder!r})
kernel = probe(7)
print(torch.ops.kvk._compile_kernel(kernel.header, kernel.expression, "sm_90a", ""))
"""
    steer = {"KVK_DEVICE_SOURCES": str(ROOT / "tests" / "cuda" / "include"), "KVK_CACHE": str(probes)}
    again = json.loads(python(code, **steer)[0])
    assert (again["origin"], again["key"]) == ("shipped", first["key"])
    other = json.loads(python(code.replace(folder, "/nowhere"), **steer)[0])
    assert other["origin"] == "compiled"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kvk/device/none.cuh", "x", "sm_90a", ""), "there is no device source kvk/device/none.cuh"),
        ((probe().header, probe().expression, "sm_70", ""), "want sm_80 or later"),
    ],
)
def test_compile_kernel_refuses(probes: Path, arguments: tuple[str, ...], message: str) -> None:  # noqa: F811
    with pytest.raises(RuntimeError, match=message):
        OPS._compile_kernel(*arguments)
