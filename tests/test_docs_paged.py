"""The examples in the documentation run, and their assertions hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
NEEDS_A_MODEL = "kvk.demo.model"  # those examples run in test_demo.py
EXAMPLES = [
    pytest.param(code, id=f"{name}-{number}")
    for name in (
        "torch",
        "conventions",
        "page-tables",
        "hadamard",
        "formats",
        "quantized",
        "record",
        "explain",
        "compress-your-cache",
        "block-sparse",
        "neighborhood",
        "sparse",
        "lightning",
        "linear",
    )
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", (DOCS / f"{name}.md").read_text(), re.DOTALL)
    )
    if NEEDS_A_MODEL not in code
]


def test_there_are_examples():
    assert len(EXAMPLES) == 20


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code):
    torch.manual_seed(0)
    exec(compile(code, "example", "exec"), {})
