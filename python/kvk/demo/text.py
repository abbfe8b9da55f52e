"""The demo's text, and the requests cut from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvk.demo.model import DemoUnavailable


def read_text(path: str | None) -> str:
    """The file's text, or without a path the help texts of the language reference, which every CPython carries."""
    if path is not None:
        try:
            return Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DemoUnavailable(f"cannot read the text {path}: {error}") from error
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class Workload:
    """Requests that begin with the same tokens and go on differently, and tokens of the same text that no one has."""

    prefix: torch.Tensor  # int64 [1, P]
    suffixes: list[torch.Tensor]  # int64 [S_i] each, S_i differ
    calibration: torch.Tensor  # int64 [1, C]

    @property
    def num_requests(self) -> int:
        return len(self.suffixes)

    @property
    def num_tokens(self) -> int:
        """Of the prefix and all suffixes."""
        return self.prefix.shape[1] + sum(len(suffix) for suffix in self.suffixes)

    def padded(self, pad_token: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The suffixes as one left-padded batch: ids int64 [B, S], real bool [B, S]."""
        width = max(len(suffix) for suffix in self.suffixes)
        ids = torch.full((self.num_requests, width), pad_token)
        real = torch.zeros(self.num_requests, width, dtype=torch.bool)
        for i, suffix in enumerate(self.suffixes):
            ids[i, width - len(suffix) :] = suffix
            real[i, width - len(suffix) :] = True
        return ids, real


def make_workload(
    tokenizer: Any, text: str, prefix_tokens: int, suffix_tokens: list[int], calibration_tokens: int = 256
) -> Workload:
    """The first tokens of the text as the prefix, later places, one per request, as suffixes, the last to calibrate."""
    needed = prefix_tokens + sum(suffix_tokens) + calibration_tokens
    # An English token has about four characters; what is not needed is not tokenized.
    ids = tokenizer(text[: 40 * needed], return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < needed:
        raise DemoUnavailable(f"the text has {len(ids)} tokens, the demo needs {needed}: use a longer --text")
    spare = (len(ids) - needed) // len(suffix_tokens)
    suffixes, start = [], prefix_tokens
    for length in suffix_tokens:
        start += spare
        suffixes.append(ids[start : start + length])
        start += length
    return Workload(ids[None, :prefix_tokens], suffixes, ids[None, len(ids) - calibration_tokens :])
