"""Formats of compressed pages: what a record of one page and kv head holds, and where (docs/formats.md)."""

from .quant import QuantFormat, QuantLayout
from .sparse import BitmapFormat, BitmapLayout

__all__ = ["BitmapFormat", "BitmapLayout", "QuantFormat", "QuantLayout"]


def format_of(numbers: list[int]) -> QuantFormat | BitmapFormat:
    """The format that these integers stand for in torch.ops.kvk; each kind has a count of its own."""
    return BitmapFormat.from_numbers(numbers) if len(numbers) == 8 else QuantFormat.from_numbers(numbers)
