"""Formats of compressed pages: what a record of one page and kv head holds, and where (docs/formats.md)."""

from kvk.formats.quant import QuantFormat, QuantLayout

__all__ = ["QuantFormat", "QuantLayout"]
