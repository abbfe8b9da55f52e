"""kvk: kernels for the KV cache of transformers, as torch ops.

The functions here are typed wrappers of ``torch.ops.kvk.*`` with the documentation; the ops are there as soon as this
package is imported. Conventions shared by all of them: docs/conventions.md.
"""

from __future__ import annotations

from kvk import _load

_load.load()

from kvk.ops.paged import append_kv, merge_states, paged_decode, paged_prefill  # noqa: E402

__version__ = "0.1.0"
__all__ = ["append_kv", "merge_states", "paged_decode", "paged_prefill"]
