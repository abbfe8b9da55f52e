"""The formats: kvk's own where it is there, else the copy that the distribution kvk-array brings along."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvk.formats import BitmapFormat, QuantFormat
    from kvk.formats.sparse import dtype_name
else:
    try:
        from kvk.formats import BitmapFormat, QuantFormat
        from kvk.formats.sparse import dtype_name
    except ImportError:
        from kvk.array._formats import BitmapFormat, QuantFormat
        from kvk.array._formats.sparse import dtype_name

__all__ = ["BitmapFormat", "QuantFormat", "dtype_name"]
